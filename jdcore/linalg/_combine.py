from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 65536
# Weights outside this range would lose digits or overflow as float32 factors of float32 rows.
_SAFE = (1e-18, 1e18)


def combine(weights: Tensor, block: Tensor, /) -> Tensor:
    """
    Weighted sum of rows ``weights @ block`` in the dtype of the block.

    The factors are never rounded to half precision, and extreme factors (rows of very different
    norms) are multiplied in float64, so that ``inf * 0`` cannot arise from finite inputs.

    :param weights: Vector [m] of any real floating dtype.
    :param block: Matrix [m, n].
    :returns: Vector [n]. Differentiable with respect to the block.
    """
    dtype = block.dtype
    if dtype == torch.float64:
        return weights.to(block) @ block
    if not (weights.is_cpu and block.is_cpu):
        weights = weights.to(block.device)
    extreme = _extreme(weights)
    factors = weights.double() if extreme else weights.float()
    if dtype == factors.dtype:
        return factors @ block
    pieces = torch.split(block, _COLUMNS, dim=1)
    return torch.cat([(factors @ piece.to(factors.dtype)).to(dtype) for piece in pieces])


def _extreme(weights: Tensor) -> bool:
    if not weights.is_cpu or weights.dtype != torch.float64:
        # Asking a device would cost a synchronisation; narrower dtypes cannot hold such weights.
        return False
    smallest, largest = _SAFE
    for weight in weights.tolist():
        if weight != 0.0 and not smallest <= abs(weight) <= largest:
            return True
    return False
