"""Peaks of tensor allocations, from the events of the profiler: exact, and the same on each run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(step: Callable[[], object]) -> int:
    """The highest sum of allocations on the CPU during a step, above what was alive before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    # What the profiler sums up by operation does not tell when memory is freed; its events do.
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]  # has run
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak
