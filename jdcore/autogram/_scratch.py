from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

CAPACITY = 4 << 20
"""Entries (16 MB of float32) that a temporary of a rule should not exceed."""


# Rows that are powers of two apart evict each other from the cache: their products take up to half
# as long again.
_GAP = 16


class Scratch:
    """
    Memory that is allocated once and reused for temporaries.

    Writing a product into fresh memory costs several times the product itself where every page has
    to be mapped first; this is the largest single gain of the direct forms.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor, slot: int = 0) -> Tensor:
        """
        An uninitialised tensor, valid until the same slot is taken again.

        :param shape: Its shape.
        :param like: Gives dtype and device.
        :param slot: Temporaries that live at the same time have different slots.
        """
        size = math.prod(shape)
        key = slot, like.dtype, like.device
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
        length = math.prod(shape[2:])
        rows = self.take((shape[0] * shape[1], length + _GAP), like)[:, :length]
        return rows.view(shape)


def pieces(length: int, largest: int) -> list[tuple[int, int]]:
    """Split ``range(length)`` into pieces of about equal size, none above ``largest``."""
    count = -(-length // max(1, min(length, largest))) if length else 0
    bounds = [length * i // count for i in range(count + 1)] if count else [0]
    return list(pairwise(bounds))
