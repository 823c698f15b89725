from __future__ import annotations

import numbers
from collections.abc import Sequence

from torch import Tensor

from jdcore._differentiable import check_differentiable, check_distinct, refuse_transformed
from jdcore._modes import refuse_tangents
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import check_flag, describe_tensor

_TRANSFORMED = "Let the transform return what is to be differentiated, and call autojac on that."


def check_outputs(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check tensors that are to be differentiated.

    :raises ParameterTypeError: If one is not of a real floating dtype.
    :raises ParameterError: If they repeat, hold no element, or none of them requires grad.
    """
    check_differentiable(tensors, parameter)
    refuse_transformed(tensors, parameter, _TRANSFORMED)
    refuse_tangents(tensors, parameter)
    check_distinct(tensors, parameter)
    # One empty tensor among others gives no row; nothing but empty ones is more likely a mistake,
    # such as a mask that leaves no sample.
    if all(tensor.numel() == 0 for tensor in tensors):
        raise ParameterError(parameter, "tensors with at least one element", "empty tensors")
    if not any(tensor.requires_grad for tensor in tensors):
        raise ParameterError(
            parameter,
            "tensors of which at least one requires grad",
            (describe_tensor(tensors[0]) if len(tensors) == 1 else f"{len(tensors)} tensors")
            + " without grad_fn",
            "Were they computed under torch.no_grad(), detached, or from frozen parameters only?",
        )


def check_call(
    outputs: Sequence[Tensor], parameter: str, retain_graph: bool, chunk_size: int | None
) -> None:
    """
    Check what all calls that differentiate have in common.

    :param outputs: What is to be differentiated, see :func:`check_outputs`.
    :param parameter: What it is called.
    :param chunk_size: ``parallel_chunk_size``, see :func:`check_chunk_size`.
    :raises ParameterError: If one of these does not fit.
    """
    check_outputs(outputs, parameter)
    check_flag(retain_graph, "retain_graph")
    check_chunk_size(chunk_size)


def check_chunk_size(value: int | None) -> None:
    """
    Check ``parallel_chunk_size``.

    :raises ParameterError: If it is neither None nor a positive int.
    """
    if value is None:
        return
    # A bool is an int to Python, and an integer of numpy is none.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ParameterTypeError("parallel_chunk_size", "an int or None", repr(value))
    if value < 1:
        raise ParameterError(
            "parallel_chunk_size", ">= 1 or None", value, "None lets the library choose."
        )
