from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from attrs import define, field
from torch import Tensor

CAPACITY = 1 << 20
"""Entries (4 MB of float32) that a temporary should not exceed on a CPU: caches are small."""

_ENTRY = 4  # bytes

# Of an accelerator: enough that its kernels take longer than their launches. More would not make
# them faster, and would lie on top of the activations of a model.
_ELSEWHERE = 256 << 20  # bytes
_FRACTION = 8  # of its free memory, should that be less

# Rows that are powers of two apart evict each other from the cache: their products take up to half
# as long again.
_GAP = 16


@define(eq=False)
class Memory:
    """
    How large temporaries may be, and where they lie.

    A CPU is fast on pieces that fit into its cache, in memory that is reused: writing a product
    into fresh pages costs several times the product itself. An accelerator is fast on few large
    operations. This is all that depends on the device.

    :param entries: Entries that a temporary may have.
    :param reused: Whether temporaries lie in memory that is kept for the next one.
    """

    entries: int
    reused: bool
    _buffers: dict[tuple[int, torch.dtype], Tensor] = field(factory=dict, init=False)

    @classmethod
    def of(
        cls, device: torch.device, budget: int | None, dtype: torch.dtype = torch.float32
    ) -> Memory:
        """
        What suits a device.

        :param budget: Bytes that a temporary may have; None lets the library choose.
        :param dtype: That of the losses. Temporaries have float32 at least.
        """
        if budget is not None:
            return cls(max(1, budget // max(_ENTRY, dtype.itemsize)), False)
        if device.type == "cpu":
            return cls(CAPACITY, True)
        return cls(_share_of_free_memory(device), False)

    def take(self, shape: tuple[int, ...], like: Tensor, slot: int = 0) -> Tensor:
        """
        An uninitialised tensor, valid until the same slot is taken again.

        :param shape: Its shape.
        :param like: Gives dtype and device.
        :param slot: Temporaries that live at the same time have different slots.
        """
        if not self.reused:
            return like.new_empty(shape)
        size, key = math.prod(shape), (slot, like.dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Grown in steps of two, never beyond what a layer needs: a small model stays small.
            buffer = like.new_empty(max(size, min(CAPACITY, 2 * size)))
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    def rows(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """
        Uninitialised rows of J, valid until slot 0 is taken again.

        :param shape: ``[K, B, *features]``.
        """
        if not self.reused:
            return like.new_empty(shape)
        length = math.prod(shape[2:])
        rows = self.take((shape[0] * shape[1], length + _GAP), like)[:, :length]
        return rows.view(shape)

    def pieces(self, length: int, size: int, least: int = 1) -> list[tuple[int, int]]:
        """
        Cut ``range(length)``.

        :param size: Entries that a temporary has for each index.
        :param least: Indices that a piece has at least.
        """
        return pieces(length, max(least, self.entries // max(1, size)))


def pieces(length: int, largest: int) -> list[tuple[int, int]]:
    """Split ``range(length)`` into pieces of about equal size, none above ``largest``."""
    count = -(-length // max(1, min(length, largest))) if length else 0
    bounds = [length * i // count for i in range(count + 1)] if count else [0]
    return list(pairwise(bounds))


@cache
def _share_of_free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        # Asked once per device: the driver counts what torch's allocator keeps for reuse as taken,
        # so that later answers would shrink as a training goes on.
        free, _ = torch.cuda.mem_get_info(device)
        return min(_ELSEWHERE, free // _FRACTION) // _ENTRY
    return _ELSEWHERE // _ENTRY
