"""
Large new tensors in huge pages.

The first touch of fresh memory costs one page fault per 4 kB, which takes longer than to fill it.
Of pages of 2 MB the kernel hands out 512 times fewer, but under its usual setting it does so only
where the program asks for it, as torch does with ``THP_MEM_ALLOC_ENABLE=1`` and numpy always.

Of 640 MB, small pages took 330 ms of the system's time and huge ones 120, in a virtual machine
whose host takes back what lies free for seconds (free page reporting); the first time after such a
pause 1400 ms, as the host has to find each page anew. Training uses its memory in every step.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes
_PAGE = 1 << 12
_MADV_HUGEPAGE = 14

Advise = Callable[[int, int, int], int]


def new_tensor(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor in the dtype and on the device of another."""
    return _advised(torch.empty(shape, dtype=like.dtype, device=like.device))


def new_tensors(likes: Iterable[Tensor], m: int) -> list[Tensor]:
    """Uninitialised tensors ``[m, *S]``, one for each tensor of shape S, as :func:`new_tensor`."""
    made = [torch.empty((m, *t.shape), dtype=t.dtype, device=t.device) for t in likes]
    for tensor in made:
        if tensor.nbytes >= _LARGE:  # a model has many parameters, most of which are small
            _advised(tensor)
    return made


def _advised(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.itemsize
    if size >= _LARGE and tensor.is_cpu:
        advise = _madvise()
        if advise is not None:
            address = tensor.data_ptr()
            # The kernel takes advice from the beginning of a page on.
            start = -(-address // _PAGE) * _PAGE
            # Mere advice: whether it is taken makes no difference but in time.
            advise(start, (address + size) // _PAGE * _PAGE - start, _MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> Advise | None:
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function: Advise = advise
    return function
