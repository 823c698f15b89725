from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore._modes import casts_anywhere, exact_products, rounding, without_autocast
from jdcore.linalg._blas import is_small, small_combination
from jdcore.linalg._pages import new_tensor

# Columns that are converted at once: all of a large block would take its memory twice more.
_COLUMNS = 65536
# Entries from which on it pays to ask for huge pages.
_LARGE = 1 << 21
# Weights outside this range would lose digits or overflow as float32 factors.
_SAFE = (1e-37, 1e37)
# Entries of a block up to which it is summed together with others, and of these together: copying
# them must cost less than the calls that it spares.
_JOINED = {"cpu": (1 << 15, 1 << 19), "elsewhere": (1 << 20, 1 << 24)}
# Of factors in the usual and in the wider precision.
_DTYPES = (torch.float32, torch.float64)


def combine(
    weights: Tensor | NDArray[np.float64] | list[float], block: Tensor, /, *, wide: bool = False
) -> Tensor:
    """
    Weighted sum of rows ``weights @ block`` in the dtype of the block.

    The factors are never rounded to half precision, and extreme factors (rows of very different
    norms) are multiplied in float64, so that ``inf * 0`` cannot arise from finite inputs.

    :param weights: Vector [m]: a Tensor of any real floating dtype, a float64 array or a list.
    :param block: Matrix [m, n].
    :param wide: Multiply in float64 anyway, as :func:`rounding_shows` advises.
    :returns: Vector [n]. Differentiable with respect to the block.
    """
    dtype = block.dtype
    exact = wide or dtype is torch.float64
    if isinstance(weights, Tensor):
        # Narrower dtypes cannot hold extreme weights. Those on a device are waited for.
        given = weights.dtype
        if given is torch.float64:
            if weights.is_cpu and is_small(block):
                return small_combination(weights.detach().numpy(), block.numpy(), dtype)
            exact = exact or _extreme(weights.numpy(force=True))
        vector = weights
        if given is not _DTYPES[exact]:
            vector = vector.double() if exact else vector.float()  # half the time of `to`
    else:
        entries = np.asarray(weights, np.float64)
        exact = exact or _extreme(entries)
        vector = torch.from_numpy(entries.astype(np.float64 if exact else np.float32))
    if not block.is_cpu:
        vector = sent(vector, block.device)
    if casts_anywhere() or rounding(vector):  # asked here, since to enter no context takes longer
        with without_autocast(block.device.type), exact_products(vector):
            return _summed(vector, block)
    return _summed(vector, block)


def _summed(vector: Tensor, block: Tensor) -> Tensor:
    """``vector @ block`` in the dtype of the block, multiplied in that of the vector."""
    dtype = block.dtype
    if dtype is not vector.dtype:
        pieces = torch.split(block, _COLUMNS, dim=1)
        return torch.cat([(vector @ piece.to(vector.dtype)).to(dtype) for piece in pieces])
    if block.numel() >= _LARGE and not block.requires_grad:
        return torch.mv(block.T, vector, out=new_tensor(block, block.shape[1]))
    return block.T.mv(vector)  # costs less to call than `matmul`


def combine_blocks(
    weights: Tensor, blocks: Sequence[Tensor], *, wide: bool = False
) -> list[Tensor]:
    """
    :func:`combine` for each of some blocks; the weights are moved to each device once.

    Small blocks are copied side by side and summed by one call: biases and scales, of which a model
    has many, would take a call each.

    :param weights: Vector [m].
    :returns: One vector for each block. Those of small blocks lie behind one another in memory.
    """
    devices = {block.device for block in blocks}
    if len(devices) > 1:
        of_device = {device: [b for b in blocks if b.device == device] for device in devices}
        made = {d: iter(combine_blocks(weights, of_device[d], wide=wide)) for d in devices}
        return [next(made[block.device]) for block in blocks]
    if not blocks[0].is_cpu:
        wide = wide or any(block.dtype == torch.float64 for block in blocks)
        weights = factors(weights, blocks[0].device, wide=wide)
        wide = weights.dtype == torch.float64
    vectors: dict[int, Tensor] = {}
    for group in _groups(blocks):
        together = [blocks[i] for i in group]
        joined = torch.cat(together, dim=1) if len(group) > 1 else together[0]
        summed = combine(weights, joined, wide=wide)
        parts = (
            torch.split(summed, [block.shape[1] for block in together])
            if len(group) > 1
            else [summed]
        )
        vectors.update(zip(group, parts, strict=True))
    return [vectors[i] for i in range(len(blocks))]


def _groups(blocks: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of blocks that are summed by one call: small ones of one dtype, others alone."""
    alone, joined = _JOINED["cpu" if blocks[0].is_cpu else "elsewhere"]
    groups: list[list[int]] = []
    open_groups: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, block in enumerate(blocks):
        size = block.numel()
        if size > alone or block.requires_grad:
            groups.append([i])
            continue
        group, filled = open_groups.get(block.dtype, ([], 0))
        if not group or filled + size > joined:
            group, filled = [], 0
            groups.append(group)
        group.append(i)
        open_groups[block.dtype] = group, filled + size
    return groups


def factors(weights: Tensor, device: torch.device, *, wide: bool) -> Tensor:
    """
    Weights on a device, in the dtype in which rows of float32 are to be multiplied by them.

    That is float64 where float32 cannot hold them.

    :param weights: Tensor of any shape and real floating dtype.
    :param wide: Whether it is to be float64 anyway, as :func:`rounding_shows` advises.
    """
    if not wide and weights.dtype == torch.float64:
        wide = _extreme(weights.numpy(force=True))
    return sent(weights, device, torch.float64 if wide else torch.float32)


def sent(
    tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None, *, copy: bool = False
) -> Tensor:
    """
    :meth:`torch.Tensor.to`, which does not wait for what an accelerator has to do before.

    Memory of the host is read before the call returns, unless it is pinned; what goes to the host
    has to be waited for.
    """
    at_once = tensor.is_cpu and not tensor.is_pinned()
    return tensor.to(device, dtype, at_once, copy)


def _extreme(weights: NDArray[np.float64]) -> bool:
    smallest, largest = _SAFE
    sizes = np.abs(weights)
    return bool((~((smallest <= sizes) & (sizes <= largest)) & (sizes != 0.0)).any())
