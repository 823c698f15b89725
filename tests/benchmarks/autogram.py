"""
Cost of a step with autogram beside an ordinary step and, where it is installed, TorchJD.

Run ``python -m tests.benchmarks.autogram [case ...] [--json FILE] [--both-allocators]``. One
thread and its CPU time, so that a busy machine matters less; methods interleaved, medians after
warm-up. Fresh memory is expensive on many virtual machines, so the second allocator setting keeps
freed memory mapped: quote both. TorchJD leaves large heaps behind, from which whatever runs next
profits: compare with an ordinary step under ``--no-peer``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from jdcore.autogram import Engine
from tests.memory import peak_bytes

try:
    from torchjd.autogram import Engine as PeerEngine
except ImportError:
    PeerEngine = None

KEEP_MAPPED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@define
class Case:
    """A model, what the engine gets of it, its losses, and how often to measure."""

    model: nn.Module
    modules: Sequence[nn.Module]
    losses: Callable[[], Tensor]
    batch_dim: int | None
    repetitions: int = 9


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def classifier(model: nn.Module, x: Tensor, repetitions: int = 9) -> Case:
    y = torch.randint(10, (len(x),))

    def losses() -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    return Case(model, [model], losses, 0, repetitions)


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10))


class ResidualBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = norm(o), norm(o)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or i != o:
            self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(self.norm_b(self.b(y)) + self.short(x))


def resnet18(norm: Callable[[int], nn.Module], classes: int | None = 10) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64), nn.ReLU()]
    i = 64
    for o, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [ResidualBlock(i, o, stride, norm), ResidualBlock(o, o, 1, norm)]
        i = o
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *([nn.Linear(512, classes)] if classes else []))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(tokens)).mean(1))


def iwmtl() -> Case:
    trunk, heads = mlp(784, 512, 512), nn.ModuleList(nn.Linear(512, 1) for _ in range(3))
    x, y = torch.randn(32, 784), torch.randn(32, 3)

    def losses() -> Tensor:
        hidden = torch.relu(trunk(x))
        return (torch.cat([head(hidden) for head in heads], 1) - y).square()

    model = nn.ModuleList([trunk, heads])
    return Case(model, [model], losses, 0)


def mtl(trunk: nn.Module, x: Tensor, features: int, m: int, repetitions: int) -> Case:
    heads = nn.ModuleList(nn.Linear(features, 1) for _ in range(m))
    y = torch.randn(len(x), m)

    def losses() -> Tensor:
        hidden = torch.relu(trunk(x))
        return torch.stack(
            [(head(hidden)[:, 0] - y[:, k]).square().mean() for k, head in enumerate(heads)]
        )

    return Case(nn.ModuleList([trunk, heads]), [trunk], losses, None, repetitions)


CASES: dict[str, Callable[[], Case]] = {
    "a64": lambda: classifier(mlp(784, 512, 512, 10), torch.randn(64, 784), 25),
    "a256": lambda: classifier(mlp(784, 512, 512, 10), torch.randn(256, 784)),
    "b": lambda: classifier(mlp(784, 4096, 4096, 10), torch.randn(32, 784), 5),
    "c": lambda: classifier(cnn(), torch.randn(32, 3, 32, 32), 7),
    "d_gn": lambda: classifier(resnet18(group_norm), torch.randn(16, 3, 32, 32), 5),
    "d_in": lambda: classifier(resnet18(instance_norm), torch.randn(16, 3, 32, 32), 5),
    "e": lambda: classifier(Transformer(), torch.randint(1000, (16, 32)), 15),
    "f": iwmtl,
    "g_b4": lambda: mtl(mlp(784, 4096, 4096), torch.randn(32, 784), 4096, 4, 5),
    "g_b16": lambda: mtl(mlp(784, 4096, 4096), torch.randn(32, 784), 4096, 16, 3),
    "g_d4": lambda: mtl(resnet18(group_norm, None), torch.randn(32, 3, 32, 32), 512, 4, 3),
    "g_d16": lambda: mtl(resnet18(group_norm, None), torch.randn(32, 3, 32, 32), 512, 16, 1),
}


class Methods:
    """What is compared. Each method returns the CPU seconds it took; of the Gramian alone, without
    the forward pass."""

    def __init__(self, case: Case) -> None:
        losses = case.losses().detach()
        self.case = case
        self.weights = torch.full_like(losses, 1.0 / losses.numel())

    def plain(self) -> float:
        start = time.thread_time()
        self.case.losses().mean().backward()
        return time.thread_time() - start

    def gramian(self, engine: Any) -> float:
        losses = self.case.losses()
        start = time.thread_time()
        engine.compute_gramian(losses)
        return time.thread_time() - start

    def two_passes(self, engine: Any) -> float:
        start = time.thread_time()
        losses = self.case.losses()
        engine.compute_gramian(losses)
        losses.backward(self.weights)
        return time.thread_time() - start

    def fused(self, engine: Engine) -> float:
        start = time.thread_time()
        engine.backward(self.case.losses(), lambda _: self.weights)
        return time.thread_time() - start


def clear(case: Case) -> None:
    for parameter in case.model.parameters():
        parameter.grad = None


Run = tuple[Case, Callable[[], float]]


def runs_of(name: str, peer: bool) -> dict[str, Run]:
    """All methods on one case, each engine with a model of its own: hooks cost time."""
    bare, ours = Methods(CASES[name]()), Methods(CASES[name]())
    engine = Engine(*ours.case.modules, batch_dim=ours.case.batch_dim)
    runs: dict[str, Run] = {
        "plain": (bare.case, bare.plain),
        "gramian": (ours.case, lambda: ours.gramian(engine)),
        "two_passes": (ours.case, lambda: ours.two_passes(engine)),
        "fused": (ours.case, lambda: ours.fused(engine)),
    }
    if peer and PeerEngine is not None:
        theirs = Methods(CASES[name]())
        other = PeerEngine(*theirs.case.modules, batch_dim=theirs.case.batch_dim)
        runs["peer_gramian"] = (theirs.case, lambda: theirs.gramian(other))
        runs["peer_step"] = (theirs.case, lambda: theirs.two_passes(other))
    return runs


def measure(name: str, repetitions: int | None, peer: bool) -> dict[str, Any]:
    """Medians in milliseconds and peaks in megabytes of all methods on one case."""
    torch.manual_seed(0)
    runs = runs_of(name, peer)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for repetition in range((repetitions or runs["plain"][0].repetitions) + 2):
        for key, (case, run) in runs.items():
            clear(case)
            seconds = run()
            if repetition >= 2:
                times[key].append(1e3 * seconds)
    return {
        "case": name,
        "ms": {key: statistics.median(values) for key, values in times.items()},
        "peak_mb": {key: peak_memory(case, run) for key, (case, run) in runs.items()},
    }


def peak_memory(case: Case, run: Callable[[], float]) -> float:
    """Largest sum of tensor allocations during one call, in megabytes."""
    clear(case)
    return peak_bytes(run) / 1e6


COLUMNS = ["case", "plain", "gramian", "peer G", "G ratio", "fused", "of plain", "peer step"]
COLUMNS += ["step ratio", "MB plain", "MB G", "MB fused", "MB peer"]


def row(result: dict[str, Any]) -> list[str]:
    ms, mb = result["ms"], result["peak_mb"]

    def ratio(over: str, under: str) -> str:
        return f"{ms[over] / ms[under]:.2f}" if over in ms else "-"

    def number(values: dict[str, float], key: str) -> str:
        return f"{values[key]:.1f}" if key in values else "-"

    times = [number(ms, "plain"), number(ms, "gramian"), number(ms, "peer_gramian")]
    times += [ratio("peer_gramian", "gramian"), number(ms, "fused"), ratio("fused", "plain")]
    times += [number(ms, "peer_step"), ratio("peer_step", "fused")]
    peaks = [number(mb, key) for key in ("plain", "gramian", "fused", "peer_step")]
    return [result["case"], *times, *peaks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--no-peer", action="store_true", help="leave TorchJD out")
    parser.add_argument("--both-allocators", action="store_true")
    arguments = parser.parse_args()
    # Not by `choices`, with which Python 3.11 refuses that there is none.
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown cases {', '.join(unknown)}: choose from {', '.join(CASES)}")
    torch.set_num_threads(1)
    mapped = all(os.environ.get(key) for key in KEEP_MAPPED)
    setting = "freed memory stays mapped" if mapped else "default allocator"
    print(f"torch {torch.__version__}, {setting}; times in ms")
    print("  ".join(f"{column:>10}" for column in COLUMNS))
    results = []
    for name in arguments.cases or CASES:
        results.append(measure(name, arguments.repetitions, not arguments.no_peer))
        results[-1]["allocator"] = "mapped" if mapped else "default"
        print("  ".join(f"{cell:>10}" for cell in row(results[-1])), flush=True)
    if arguments.both_allocators and not mapped:
        results += run_mapped(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def run_mapped(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same in a process of its own, with the other allocator setting."""
    path = Path(f"{arguments.json or 'autogram'}.mapped")
    command = [sys.executable, "-m", "tests.benchmarks.autogram", *arguments.cases]
    command += ["--json", str(path)]
    if arguments.repetitions:
        command += ["--repetitions", str(arguments.repetitions)]
    if arguments.no_peer:
        command.append("--no-peer")
    subprocess.run(command, env={**os.environ, **KEEP_MAPPED}, check=True)
    results: list[dict[str, Any]] = json.loads(path.read_text())
    path.unlink()
    return results


if __name__ == "__main__":
    main()
