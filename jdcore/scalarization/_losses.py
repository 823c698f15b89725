from __future__ import annotations

import torch
from torch import Tensor

from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import FLOATS, describe_tensor, holds_real_numbers


def check_losses(losses: Tensor, parameter: str = "losses") -> None:
    """
    Refuse anything that is not a vector of real floating losses.

    :raises ParameterTypeError: If it is no dense Tensor with entries, or not of a real floating
        dtype.
    :raises ParameterError: If it does not have one dimension.
    """
    expected = "a floating Tensor of shape [m], one loss per objective"
    if not holds_real_numbers(losses) or losses.dtype not in FLOATS:
        hint = (
            "Put them together: torch.stack(losses)." if isinstance(losses, (list, tuple)) else None
        )
        raise ParameterTypeError(parameter, expected, describe_tensor(losses), hint)
    if losses.ndim != 1:
        hint = f"Flatten them: {parameter}.flatten()."
        raise ParameterError(parameter, expected, describe_tensor(losses), hint)


def require_above(losses: Tensor, bound: Tensor | float, parameter: str = "losses") -> None:
    """
    Refuse losses whose logarithm does not exist. NaN passes, as it gives NaN.

    :param losses: Losses [m].
    :param bound: What each must be above: a number, or a Tensor [m].
    :raises ParameterError: If a loss is not.
    """
    least = torch.as_tensor(bound, dtype=losses.dtype, device=losses.device)
    low = (losses.detach() <= least).nonzero().flatten().tolist()
    if low:
        limit = bound if isinstance(bound, (int, float)) else bound[low[0]].item()
        raise ParameterError(
            parameter, f"above {limit:g}", f"{losses[low[0]].item():g} for objective {low[0]}"
        )
