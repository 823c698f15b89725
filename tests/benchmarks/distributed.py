"""
Bytes per step on several processes, beside what plain DistributedDataParallel or FSDP2 sends.

    python -m tests.benchmarks.distributed [--processes 2 4] [--width 512] [--json FILE]

What all processes send is read off the loopback interface of this machine (Linux), with headers, so
nothing else should use it meanwhile. gloo's collectives are not those of NCCL: its reduce-scatter
sends as much as an all-reduce, which FSDP2 pays for, and jdcore replaces.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import asdict, frozen
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jdcore
from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine
from jdcore.autojac import backward, jac_to_grad, mtl_backward

Step = Callable[[], None]


@frozen
class Volume:
    """What a step sends, as a multiple of what an ordinary step sends."""

    processes: int
    setup: str
    step: str
    expected: str
    ratio: float


class Net(nn.Module):
    """Wide linear layers, and a head for each task."""

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            x = layer(x).tanh()
        return x, [head(x) for head in self.heads]


def losses_of(outputs: list[Tensor]) -> list[Tensor]:
    return [output.square().mean() for output in outputs]


def weighting(gramian: Tensor) -> Tensor:
    """Cheap, and the same on all processes."""
    return gramian.diagonal().rsqrt()


def replicated(width: int, tasks: int) -> dict[str, tuple[str, Step]]:
    """Steps of a DistributedDataParallel module, with what they should send."""
    model = DistributedDataParallel(Net(width, tasks))
    data = torch.randn(8, width)

    def ordinary() -> None:
        torch.stack(losses_of(model(data)[1])).sum().backward()

    def step(aggregator: Any) -> Step:
        def run() -> None:
            backward(losses_of(model(data)[1]))
            jac_to_grad(model.parameters(), aggregator)

        return run

    def multi_task() -> None:
        features, outputs = model(data)
        mtl_backward(losses_of(outputs), features)
        jac_to_grad(model.parameters(), GramianAggregator(weighting))

    return {
        "ordinary": ("1", ordinary),
        "Gramian": (f"(m + 1) / 2 = {(tasks + 1) / 2}", step(GramianAggregator(weighting))),
        "Gramian, heads apart": ("the same", multi_task),
        "Mean": ("1", step(jdcore.get_aggregator("mean"))),
        "TrimmedMean": ("as Gramian", step(jdcore.get_aggregator("trimmed_mean", trim_number=0))),
        "GradDrop": (f"m + 1/2 = {tasks + 0.5}", step(jdcore.get_aggregator("graddrop"))),
    }


def sharded(width: int, tasks: int) -> dict[str, tuple[str, Step]]:
    """Steps of a module under FSDP2."""
    model = fully_sharded(Net(width, tasks))
    data = torch.randn(8, width)

    def ordinary() -> None:
        torch.stack(losses_of(model(data)[1])).sum().backward()

    def step(chunk_size: int) -> Step:
        def run() -> None:
            backward(losses_of(model(data)[1]), parallel_chunk_size=chunk_size)
            jac_to_grad(model.parameters(), GramianAggregator(weighting))

        return run

    return {
        "ordinary": ("1", ordinary),
        "Gramian, gathered": (f"(m + 2) / 4 = {(tasks + 2) / 4} with gloo", step(tasks)),
        "Gramian, by passes": (f"(m + 1) / 2 = {(tasks + 1) / 2} with gloo", step(1)),
    }


def fully_sharded(model: Net) -> Net:
    """The model with a unit for each layer."""
    for part in (*model.layers, *model.heads):
        fully_shard(part)
    fully_shard(model)
    return model


def samples(width: int, tasks: int) -> dict[str, tuple[str, Step]]:
    """One loss per sample: 8 or 32 on each process."""
    model = DistributedDataParallel(Net(width, 1))
    return by_samples(model, Engine(model.module, batch_dim=0), width, tasks)


def sharded_samples(width: int, tasks: int) -> dict[str, tuple[str, Step]]:
    """The same under FSDP2."""
    model = fully_sharded(Net(width, 1))
    return by_samples(model, Engine(model, batch_dim=0), width, tasks)


def by_samples(
    model: nn.Module, engine: Engine, width: int, tasks: int
) -> dict[str, tuple[str, Step]]:
    """Steps of one loss per sample."""
    count = 8 if tasks == 2 else 32
    data = torch.randn(count, width)

    def losses() -> Tensor:
        found: Tensor = model(data)[1][0].squeeze(1).square()
        return found

    def ordinary() -> None:
        losses().sum().backward()

    def step(**options: Any) -> Step:
        def run() -> None:
            engine.backward(losses(), weighting, **options)

        return run

    return {
        "ordinary": ("1", ordinary),
        f"{count} samples each": ("below 1.3 on wide layers", step()),
        f"{count} samples each, weights per process": ("1", step(per_process=True)),
    }


def sent() -> int:
    """Bytes that all processes of this machine have sent to one another."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("no loopback interface")


def measured(step: Step) -> int:
    """What a step sends; the median of three."""
    found = []
    for _ in range(3):
        dist.barrier()
        time.sleep(0.05)
        start = sent()
        dist.barrier()
        step()
        dist.barrier()
        time.sleep(0.05)
        found.append(sent() - start)
        dist.barrier()
    return int(statistics.median(found))


SETUPS = {
    "replicated": replicated,
    "sharded": sharded,
    "samples": samples,
    "sharded samples": sharded_samples,
}


def work(rank: int, size: int, store: str, width: int, results: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = []
    for name, setup in SETUPS.items():
        for tasks in (2, 8):
            plain = 0
            for label, (expected, step) in setup(width, tasks).items():
                step()  # once, as the first step of each kind also sends other things
                volume = measured(step)
                plain = plain or volume
                text = label if "samples" in name else f"{label}, m = {tasks}"
                found.append(Volume(size, name, text, expected, volume / plain))
    if rank == 0:
        results.send(found)
    dist.destroy_process_group()


def run(size: int, width: int) -> list[Volume]:
    """All steps on some processes."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = size, str(Path(folder) / "store"), width, there
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        while not here.poll(1):
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise RuntimeError("a process has failed")
        found: list[Volume] = here.recv()
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [volume for size in arguments.processes for volume in run(size, arguments.width)]
    print(f"processes  {'setup':<15}  {'step':<40}  bytes / ordinary  expected")
    for v in found:
        print(f"{v.processes:<9}  {v.setup:<15}  {v.step:<40}  {v.ratio:>16.2f}  {v.expected}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(volume) for volume in found], indent=2))


if __name__ == "__main__":
    main()
