from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdcore.validators import check_blocks

# 16384 columns of 8 float64 rows are 1 MB: large enough for the product to run at full speed, small
# enough to stay in cache, so that converting costs little beside reading J once.
_COLUMNS = 16384


def gramian(jacobian: Tensor | Sequence[Tensor], /) -> Tensor:
    """
    Gramian ``J Jᵀ`` of a matrix, or of a Jacobian given as column blocks, in float64.

    Blocks are never concatenated and need not share a dtype. Accumulating in float64 keeps the
    error near 1e-13 of the largest diagonal entry where ``J @ J.T`` in float32 reaches 1e-3 for
    long rows, and neither overflows nor underflows for any float32 input.

    :param jacobian: Matrix [m, n] of a real floating dtype, or blocks [m, n1], [m, n2], ...
    :returns: float64 Tensor [m, m] on the device of the Jacobian, exactly symmetric.
    :raises ParameterError: If a block is no matrix, or the blocks differ in their number of rows.
    """
    blocks = [jacobian] if isinstance(jacobian, Tensor) else list(jacobian)
    check_blocks(blocks, "jacobian")
    return sum_gramians(blocks)


def sum_gramians(blocks: Sequence[Tensor]) -> Tensor:
    """:func:`gramian` of blocks that have been checked."""
    first = blocks[0]
    if len(blocks) == 1 and first.shape[1] <= _COLUMNS:
        wide = first.double()
        return wide @ wide.T
    total = first.new_zeros((len(first), len(first)), dtype=torch.float64)
    for block in blocks:
        _add_gramian(total, block)
    return total


def _add_gramian(total: Tensor, block: Tensor) -> None:
    m, n = block.shape
    if block.dtype == torch.float64:
        total.addmm_(block, block.T)
        return
    # One reused buffer: fresh large temporaries cost more in page faults than in arithmetic.
    buffer = total.new_empty((m, min(n, _COLUMNS)))
    for start in range(0, n, _COLUMNS):
        piece = block[:, start : start + _COLUMNS]
        wide = buffer[:, : piece.shape[1]].copy_(piece)
        total.addmm_(wide, wide.T)
