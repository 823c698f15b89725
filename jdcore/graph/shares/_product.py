from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, reduce

import torch
from torch import Tensor

from jdcore._modes import rounding

_COLUMNS = 16384
_COLUMNS_ELSEWHERE = 2048

HALVES = (torch.bfloat16, torch.float16)

_IN_FLOAT64: ContextVar[bool] = ContextVar("in_float64", default=False)


@contextmanager
def products_in_float64() -> Iterator[None]:
    """
    Make products of this context in float64, whatever the dtypes of their factors.

    Those that are written to a given place are rows, which are as exact as those of a backward pass
    anyway.
    """
    token = _IN_FLOAT64.set(True)
    try:
        yield
    finally:
        _IN_FLOAT64.reset(token)


def columns_at_once(rows: Tensor) -> int:
    """
    Entries of float32 inner products of rows [R, n]: more of them lose digits.

    On CPUs shorter ones are slower, on accelerators longer ones: the kernels for few long rows keep
    most of the device waiting. The matrices [R, R] that have to be added up there are to be small
    beside the rows.
    """
    return _COLUMNS if rows.is_cpu else max(_COLUMNS_ELSEWHERE, 16 * rows.shape[0])


def cut(tensor: Tensor, most: int, dim: int) -> Sequence[Tensor]:
    """Parts of at most so many entries along a dimension; of one part, no view is made."""
    return (tensor,) if tensor.shape[dim] <= most else torch.split(tensor, most, dim)


def sum_over(tensor: Tensor, dims: list[int]) -> Tensor:
    """The sum over some dimensions, in at least float32."""
    return tensor.sum(dims, dtype=torch.float32 if tensor.dtype in HALVES else None)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """
    ``a @ b`` of two matrices or two batches of them, computed in at least float32.

    All products of this room are made here, since TF32 must not enter them.

    :param out: Where to write it, in float32 or float64.
    """
    if out is None and _IN_FLOAT64.get() and not a.is_complex():
        return torch.matmul(a.double(), b.double())
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype in HALVES:
        if a.is_cuda and out is None and _has_mixed(a.dtype, a.device):
            return _mixed(a, b)
        a, b = a.float(), b.float()
    # `matmul` puts five views around a batched product: on accelerators, a fifth of its time.
    batched = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0]  # `len` is a function of Python
    multiply = torch.bmm if batched else torch.matmul
    if not (exact := rounding(a)):
        return multiply(a, b, out=out)
    with exact:
        return multiply(a, b, out=out)


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """
    ``weights @ rows``, in the wider one of their dtypes, but at least in float32.

    :param weights: Vector [R] of any real dtype.
    :param rows: Matrix [R, n].
    """
    return product(widened(weights)[None], widened(rows))[0]


def outer(inputs: Tensor, grads: Tensor, *, grads_first: bool) -> Tensor:
    """
    Sums of outer products over positions, written out, in at least float32.

    :param inputs: Shape [B, T, i].
    :param grads: Shape [K, B, T, o].
    :returns: Shape [K, B, o, i] if the gradients come first, else [K, B, i, o].
    """
    inputs, grads = widened(inputs), widened(grads)
    return product(grads.mT, inputs) if grads_first else product(inputs.mT, grads)


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """
    ``a @ b.T`` of two matrices with long rows, float64.

    In pieces, since long inner products lose digits in float32 (1e-3 for rows of 1e7 entries).
    """
    length = a.shape[1]
    count = length // columns_at_once(a)
    width = length // count if count else 0
    total = product(a[:, count * width :], b[:, count * width :].T).double()
    if count:
        heads = (rows[:, : count * width].view(len(rows), count, width) for rows in (a, b))
        left, right = (head.transpose(0, 1) for head in heads)
        total += product(left, right.mT).sum(0, dtype=torch.float64)
    return total


def _has_mixed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies halves on a device into float32 (``out_dtype``): only on CUDA."""
    if dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    return _ever_has_mixed(dtype, device)


@cache
def _ever_has_mixed(dtype: torch.dtype, device: torch.device) -> bool:
    # Devices of AMD are called so, too; they have none, and older ones of NVIDIA those of float16.
    if torch.version.hip is not None:
        return False
    return dtype is torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)


def _mixed(a: Tensor, b: Tensor) -> Tensor:
    # Accelerators multiply halves exactly and add up in float32, without copies in float32. Only
    # these two operations take the dtype of what comes out.
    if a.ndim == b.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.ndim == b.ndim == 3 and len(a) == len(b):
        return torch.bmm(a, b, out_dtype=torch.float32)
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    a, b = (x.expand(*shape, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return torch.bmm(a, b, out_dtype=torch.float32).view(*shape, a.shape[-2], b.shape[-1])


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """
    ``sum_k weights[k, b] rows[k, b]``: the tasks of each sample merged, in at least float32.

    :param weights: Shape [K, B], in float64 where it is to be summed in float64.
    :param rows: Shape [K, B, ...].
    :returns: Shape [B, ...].
    """
    if rows.shape[0] == 1:
        return scaled(weights, rows)[0]
    dtype = _of_sums(weights, rows)
    if not (rows.is_cpu and rows.shape[1] > 1):
        # One call for all tasks; on CPUs that is slower where there are samples.
        by_sample = rows.to(dtype).flatten(2).transpose(0, 1)
        summed = product(weights.to(dtype).T[:, None], by_sample)
        return summed.view(rows.shape[1:])
    total = scaled(weights[0], rows[0])
    scale = weights.to(dtype).view(*weights.shape, *[1] * (rows.ndim - 2))
    for k in range(1, rows.shape[0]):
        total.addcmul_(rows[k].to(dtype), scale[k])
    return total


def scaled(weights: Tensor, rows: Tensor) -> Tensor:
    """
    Rows times their weights, in at least float32.

    :param weights: Shape [..., B], as for :func:`weighted_sum`.
    :param rows: Shape [..., B, ...], with as many dimensions before B.
    """
    scale = weights.to(_of_sums(weights, rows))
    return rows * scale.view(*weights.shape, *[1] * (rows.ndim - weights.ndim))


def _of_sums(weights: Tensor, rows: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (weights.dtype, rows.dtype) else torch.float32


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor; sparse ones may be among them."""
    # Torch adds sparse to dense, not dense to sparse.
    return reduce(lambda a, b: b + a if a.is_sparse else a + b, tensors)
