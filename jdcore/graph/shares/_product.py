from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """
    ``a @ b`` of two matrices or two batches of them, computed in at least float32.

    :param out: Where to write it, in float32 or float64.
    """
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype in HALVES:
        if a.is_cuda and out is None and _MIXED:
            return _mixed(a, b)
        a, b = a.float(), b.float()
    return torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)


# Accelerators multiply halves exactly and add up in float32, without copies in float32.
_MIXED = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.bmm, "dtype")


def _mixed(a: Tensor, b: Tensor) -> Tensor:
    multiply = torch.bmm if a.ndim == 3 else torch.mm
    return multiply(a, b, out_dtype=torch.float32)


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """
    ``sum_k weights[k, b] rows[k, b]``: the tasks of each sample merged, in at least float32.

    :param weights: Shape [K, B].
    :param rows: Shape [K, B, ...].
    :returns: Shape [B, ...].
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    scale = weights.to(dtype).reshape(*weights.shape, *[1] * (rows.ndim - 2))
    total = rows[0] * scale[0]
    for k in range(1, len(rows)):
        total.addcmul_(rows[k].to(dtype), scale[k])
    return total
