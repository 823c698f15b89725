from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore._environment import switched_on
from jdcore.errors import NonFiniteError

_WIDE = frozenset((torch.float32, torch.float64))


def finite_required(check_finite: bool | None) -> bool:
    """Whether non-finite input raises: the argument, or ``JDCORE_CHECK_FINITE`` if None."""
    if check_finite is None:
        return switched_on("JDCORE_CHECK_FINITE")
    return check_finite


def gramian_error(gramian: NDArray[np.float64]) -> NonFiniteError:
    """The error for a Gramian with non-finite entries, naming the rows that cause them."""
    # A row with such an entry has no finite square; products of finite rows may still overflow.
    rows = np.flatnonzero(~np.isfinite(np.diagonal(gramian)))
    if rows.size == 0:
        rows = np.flatnonzero(~np.isfinite(gramian).all(axis=1))
    return NonFiniteError(rows.tolist())


def is_finite(block: Tensor) -> bool:
    """Whether every entry is finite, reading the block once in the common case."""
    # A sum (of squares) is finite only if all terms are; the converse fails on overflow, settled
    # entry by entry. Squares of half precision would overflow too often.
    squared = block.dtype in _WIDE and block.ndim == 1
    total: float = (block.dot(block) if squared else block.sum()).item()
    # A difference with itself is NaN for what is not finite; said without a call.
    return total - total == 0.0 or bool(torch.isfinite(block).all())


def all_finite(blocks: Sequence[Tensor]) -> bool:
    """Whether every entry of all blocks is finite; an accelerator is asked once for all of them."""
    if len(blocks) == 1:
        return is_finite(blocks[0])
    if not blocks or blocks[0].is_cpu:
        return all(map(is_finite, blocks))
    # By the largest entries, as norms of squares overflow for finite float32 rows; a NaN among them
    # stays.
    largest = torch._foreach_norm([block.flatten() for block in blocks if block.numel()], math.inf)
    one = [x.to(largest[0].device, torch.float64) for x in largest]  # of several devices
    return not largest or bool(torch.stack(one).isfinite().all())


def nonfinite_rows(blocks: Sequence[Tensor]) -> list[int]:
    """Indices of the rows with a non-finite entry in any block."""
    # On the CPU, as blocks may lie on several devices.
    bad = torch.stack([~torch.isfinite(block).all(dim=1).cpu() for block in blocks]).any(dim=0)
    return bad.nonzero().flatten().tolist()
