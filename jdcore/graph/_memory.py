from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from attrs import define

CAPACITY = 1 << 19
"""Entries (2 MB of float32) that a temporary should not exceed on a CPU: caches are small."""

_ENTRY = 4  # bytes

# Of an accelerator: enough that its kernels take longer than their launches. More would not make
# them faster, and would lie on top of the activations of a model.
_ELSEWHERE = 256 << 20  # bytes
_FRACTION = 8  # of its free memory: should that be less, and for rows

# What a temporary may have anyway, and beyond that which part of what a step holds (in entries).
# Larger ones would show in the peak of its memory.
_LEAST = 1 << 23
_PART = 8

# Entries that layers may have together: the launches of larger ones take less than the operations.
_JOINED = 1 << 22

# Entries of rows that may always be kept: 512 MB in float32.
_ROWS = 1 << 27


@define(eq=False)
class Memory:
    """
    How large temporaries may be.

    A CPU is fast on pieces that fit into its cache, an accelerator on few large operations. This is
    all that depends on the device.

    :param entries: Entries that a temporary may have.
    :param gradients: Entries that the gradients of several losses at one place may have.
    :param held: Entries of rows that may be held at once, or kept, where there are no samples.
    :param cached: Whether what fits into caches counts for more than the number of operations.
    """

    entries: int
    gradients: int
    held: int
    cached: bool

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
            entries = max(1, budget // max(_ENTRY, dtype.itemsize))
            held = _ROWS if device.type == "cpu" else max(_ROWS, entries)
            return cls(entries, entries, held, cached=False)
        if device.type == "cpu":
            # Weights that are read once count for more than gradients that leave the cache.
            return cls(CAPACITY, 4 * CAPACITY, _ROWS, cached=True)
        share = _share_of_free_memory(device)
        entries, gradients = min(_ELSEWHERE, share) // _ENTRY, share // _ENTRY
        return cls(entries, gradients, max(_ROWS, gradients), cached=False)

    @property
    def read_at_once(self) -> int:
        """
        Entries that rows may have which are made by one call and read by the next one.

        On a CPU as many as its second cache has room for, beside what they are made of.
        """
        return self.entries // 4 if self.cached else self.entries

    @property
    def joined(self) -> int:
        """
        Entries that tensors of several layers may have that are computed together.

        Larger operations take longer than their launches one by one.
        """
        return min(self.entries // 4, _JOINED)

    def suit(self, held: int) -> None:
        """
        Keep temporaries small beside what a step holds.

        :param held: The entries of that, about.
        """
        self.entries = min(self.entries, max(_LEAST, held // _PART))

    @property
    def waiting(self) -> int:
        """Entries of gradients that may wait during a pass, until several are served at a time."""
        return 3 * self.joined // 2

    def widen(self) -> None:
        """Keep temporaries as large in float64 as they were in float32."""
        self.entries = max(1, self.entries // 2)

    def pieces(self, length: int, size: int) -> Sequence[tuple[int, int]]:
        """
        Cut ``range(length)``.

        :param size: Entries that a temporary has for each index.
        """
        return pieces(length, max(1, self.entries // max(1, size)))


def blocks(shape: Sequence[int], largest: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array into blocks of at most so many entries, each as long a run of it as possible."""
    if not shape:
        yield ()
        return
    rest = math.prod(shape[1:])
    whole = [slice(0, length) for length in shape[1:]]
    for start, stop in pieces(shape[0], largest // max(1, rest)):
        inner = [whole] if rest <= largest else blocks(shape[1:], largest)
        for block in inner:
            yield slice(start, stop), *block


@lru_cache(maxsize=1024)  # the same for each step
def pieces(length: int, largest: int) -> Sequence[tuple[int, int]]:
    """Split ``range(length)`` into pieces of about equal size, none above ``largest``."""
    count = -(-length // max(1, min(length, largest))) if length else 0
    bounds = [length * i // count for i in range(count + 1)] if count else [0]
    return tuple(pairwise(bounds))


@cache  # so that a plan does not change from step to step with what happens to be free
def _share_of_free_memory(device: torch.device) -> int:
    """In bytes."""
    free = free_memory(device)
    return 1 << 30 if free is None else free // _FRACTION


def free_memory(device: torch.device, *, enough: int | None = None) -> int | None:
    """
    Bytes that can still be allocated on a device, None if it does not tell.

    :param enough: Of how many it need not be told whether there are more.
    """
    # Older versions of torch.accelerator do not tell of memory, the modules of single devices do.
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return None
    free: int = module.mem_get_info(device)[0]
    if enough is not None and free >= enough:
        return free
    # What torch holds in reserve, freed by earlier steps, is free as well. To count that takes
    # longer than to differentiate a small network.
    reserve: int = module.memory_reserved(device) - module.memory_allocated(device)
    return free + reserve
