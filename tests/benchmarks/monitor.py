"""
What ``monitor.record`` costs of a training step: ``python -m tests.benchmarks.monitor``.

Steps with and without a record alternate in one process; medians of the CPU time of one thread. The
last column is what it takes per step to make the numbers when the history is read.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import thread_time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from jdcore import monitor
from jdcore.aggregation import UPGrad, UPGradWeighting
from jdcore.autogram import Engine
from jdcore.autojac import backward, jac_to_grad

Step = Callable[[], None]


def _perceptron(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, outputs),
    )


def tasks(m: int, width: int, batch: int) -> Step:
    """A step of Adam with m losses that share a perceptron."""
    model, aggregator = _perceptron(width, m), UPGrad()
    inputs, targets = torch.randn(batch, width), torch.randn(batch, m)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters)

    def step() -> None:
        optimizer.zero_grad()
        backward((model(inputs) - targets).square().mean(0))
        jac_to_grad(parameters, aggregator)
        optimizer.step()

    return step


def samples(width: int, batch: int) -> Step:
    """A step of Adam with one loss per sample of a batch."""
    model, weighting = _perceptron(width, 10), UPGradWeighting()
    inputs, labels = torch.randn(batch, width), torch.randint(10, (batch,))
    engine, optimizer = Engine(model, batch_dim=0), torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        engine.backward(cross_entropy(model(inputs), labels, reduction="none"), weighting)
        optimizer.step()

    return step


CASES: dict[str, Callable[[], Step]] = {
    "2 tasks, width 64, batch 64": lambda: tasks(2, 64, 64),
    "2 tasks, width 512, batch 64": lambda: tasks(2, 512, 64),
    "8 tasks, width 64, batch 64": lambda: tasks(8, 64, 64),
    "8 tasks, width 512, batch 64": lambda: tasks(8, 512, 64),
    "32 samples, width 512": lambda: samples(512, 32),
    "64 samples, width 512": lambda: samples(512, 64),
    "256 samples, width 512": lambda: samples(512, 256),
}


def measure(step: Step, repetitions: int) -> tuple[float, float]:
    """Seconds of a step without and with a record."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for times, recorded in zip(found, (False, True), strict=True):
            with monitor.record() if recorded else nullcontext():
                step()  # brings back what the other kind has driven out of the caches
                start = thread_time()
                step()
                times.append(thread_time() - start)
    return median(found[0]), median(found[1])


def keep_memory() -> None:
    """
    Let the allocator keep what is freed.

    Under its usual setting, glibc gives the top of the heap back to the kernel after each step, and
    takes it anew in the next one, unless something lies there, such as what a record keeps. Steps
    with a record would then be the faster ones, by a fifth.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -2):  # M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, 1 << 28)


def reading(step: Step, steps: int = 64) -> float:
    """Seconds per step to read a history."""
    with monitor.record() as history:
        for _ in range(steps):
            step()
    start = thread_time()
    history.to_dict()
    return (thread_time() - start) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    keep_memory()
    print(f"{'case':32}{'ms':>8}{'record, us':>12}{'of a step':>11}{'read, us':>10}")
    for name, make in CASES.items():
        torch.manual_seed(0)
        step = make()
        measure(step, 5)
        plain, recorded = measure(step, repetitions)
        extra = recorded - plain
        row = f"{name:32}{1e3 * plain:8.2f}{1e6 * extra:12.0f}{extra / plain:11.1%}"
        print(f"{row}{1e6 * reading(step):10.0f}", flush=True)


if __name__ == "__main__":
    main()
