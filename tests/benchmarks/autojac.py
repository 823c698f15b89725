"""
Time and memory of one training step with Jacobians, side by side with torchjd in one process.

    python -m tests.benchmarks.autojac [--models mlp resnet] [--m 2 4 8 16] [--steps backward lean]
        [--reps 5] [--json FILE]

Every step goes end to end, from the forward pass to the ``.grad`` of all parameters, with UPGrad.
Steps of all methods alternate, and medians are compared: absolute times vary by a factor of two
with the state of the machine, ratios less. Each timed step follows an untimed one of its kind, as
it does in training: memory that another method has just given back can be slow to take. Memory is
the exact peak of tensor allocations during one step above what is alive before it (parameters,
data). The peer is imported here only; without it, its columns are left out.

Fresh large CPU buffers cost as much as the arithmetic on some machines (page faults). jdcore asks
for huge pages where it allocates a Jacobian; set ``THP_MEM_ALLOC_ENABLE=1``, by which torch asks
for them everywhere, to see all methods with them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import jdcore
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from tests.memory import peak_bytes


class Block(nn.Module):
    """A residual block with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(32, outputs) for _ in range(2))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.norms[0](self.first(x)))
        return relu(self.skip(x) + self.norms[1](self.second(inner)))


class Pool(nn.Module):
    """Mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def mlp() -> tuple[nn.Module, Tensor, int]:
    """Trunk 1024-4096-4096, a batch of 32, and the width of the features."""
    trunk = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU())
    return trunk, torch.randn(32, 1024), 4096


def resnet() -> tuple[nn.Module, Tensor, int]:
    """A ResNet-18 with GroupNorm on 16 images of 32 x 32."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [
        Block(before, after, 1 if before == after else 2)
        for before, after in zip((64, *widths), widths, strict=False)
    ]
    trunk = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *blocks, Pool())
    return trunk, torch.randn(16, 3, 32, 32), 512


def small() -> tuple[nn.Module, Tensor, int]:
    """A perceptron of width 64, where calling operators costs more than what they do."""
    trunk = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return trunk, torch.randn(64, 32), 64


# Made once, as training does. Neither has a state.
AGGREGATOR, WEIGHTING = jdcore.get_aggregator("upgrad"), jdcore.get_weighting("upgrad")

MODELS = {"mlp": mlp, "resnet": resnet, "small": small}


class Problem:
    """A trunk with m heads of ten classes each."""

    def __init__(self, model: str, m: int, device: str) -> None:
        torch.manual_seed(0)
        trunk, x, width = MODELS[model]()
        self.trunk = trunk.to(device)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(m)).to(device)
        self.x = x.to(device)
        self.targets = torch.randint(10, (m, len(x)), device=device)
        self.shared = list(self.trunk.parameters())
        self.parameters = [*self.shared, *self.heads.parameters()]

    def forward(self) -> tuple[list[Tensor], Tensor]:
        features = self.trunk(self.x)
        pairs = zip(self.heads, self.targets, strict=True)
        return [cross_entropy(head(features), target) for head, target in pairs], features

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
            if hasattr(parameter, "jac"):
                del parameter.jac


Step = Callable[[Problem], Any]


def plain(problem: Problem) -> None:
    """Gradient descent on the mean of the losses."""
    losses, _ = problem.forward()
    torch.stack(losses).mean().backward()


def passes(problem: Problem) -> None:
    """m plain backward passes, whose gradients are thrown away: the floor of row by row."""
    losses, _ = problem.forward()
    for loss in losses:
        torch.autograd.grad(loss, problem.parameters, retain_graph=True, allow_unused=True)


def ours(problem: Problem) -> None:
    """Backward and jac_to_grad on all parameters."""
    backward(problem.forward()[0])
    jac_to_grad(problem.parameters, AGGREGATOR)


def ours_mtl(problem: Problem) -> None:
    """mtl_backward and jac_to_grad on the trunk."""
    mtl_backward(*problem.forward())
    jac_to_grad(problem.shared, AGGREGATOR)


def ours_lean(problem: Problem) -> None:
    """gramian_backward on all parameters."""
    gramian_backward(problem.forward()[0], WEIGHTING)


def ours_engine(problem: Problem) -> None:
    """Engine.backward on all parameters. The engine is made anew: its hooks go with it."""
    engine = Engine(problem.trunk, problem.heads, batch_dim=None)
    engine.backward(torch.stack(problem.forward()[0]), WEIGHTING)


def peer_steps() -> dict[str, Step]:
    """The same steps with torchjd, if it is installed."""
    try:
        from torchjd import aggregation, autojac
    except ImportError:
        return {}
    aggregator = aggregation.UPGrad()

    def peer(problem: Problem) -> None:
        autojac.backward(problem.forward()[0])
        autojac.jac_to_grad(problem.parameters, aggregator)

    def peer_mtl(problem: Problem) -> None:
        autojac.mtl_backward(*problem.forward())
        autojac.jac_to_grad(problem.shared, aggregator)

    return {"peer": peer, "peer mtl": peer_mtl}


STEPS: dict[str, Step] = {
    "plain": plain,
    "m passes": passes,
    "backward": ours,
    "mtl": ours_mtl,
    "lean": ours_lean,
    "engine": ours_engine,
}


@frozen
class Result:
    """One line of the table."""

    model: str
    m: int
    step: str
    milliseconds: float
    megabytes: float


def milliseconds(step: Step, problem: Problem, device: str) -> float:
    """Processor time for one CPU thread, as other processes disturb it less; else wall time."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    problem.clear()
    _wait(device)
    start = clock()
    step(problem)
    _wait(device)
    return 1e3 * (clock() - start)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_megabytes(step: Step, problem: Problem, device: str) -> float:
    """Highest sum of tensor allocations during a step, above what was alive before it."""
    problem.clear()
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(problem)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_bytes(lambda: step(problem)) / 2**20


def measure(model: str, m: int, steps: dict[str, Step], reps: int, device: str) -> list[Result]:
    """Alternate the steps of one problem."""
    problem = Problem(model, m, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(reps):
        for name, step in steps.items():
            milliseconds(step, problem, device)
            times[name].append(milliseconds(step, problem, device))
    return [
        Result(
            model, m, name, statistics.median(times[name]), peak_megabytes(step, problem, device)
        )
        for name, step in steps.items()
    ]


def show(results: list[Result]) -> None:
    """Print one problem: absolute figures, then ratios to the peer and to m passes."""
    by_name = {result.step: result for result in results}
    for result in results:
        ratios = []
        for other in ("m passes", "peer mtl" if result.step == "mtl" else "peer", "plain"):
            if other in by_name and other != result.step:
                reference = by_name[other]
                ratios.append(
                    f"{result.milliseconds / reference.milliseconds:5.2f}x time"
                    f" {result.megabytes / reference.megabytes:5.2f}x memory of {other}"
                )
        print(
            f"{result.model:7s} m={result.m:2d} {result.step:9s}"
            f"{result.milliseconds:9.1f} ms {result.megabytes:8.1f} MB   {'; '.join(ratios)}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["mlp", "resnet"])
    parser.add_argument("--m", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--steps", nargs="+", help="by default all of them")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = STEPS | peer_steps()
    if arguments.steps:
        steps = {name: steps[name] for name in arguments.steps}
    results = []
    for model in arguments.models:
        for m in arguments.m:
            found = measure(model, m, steps, arguments.reps, arguments.device)
            show(found)
            results += found
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(result) for result in results], file, indent=1)


if __name__ == "__main__":
    main()
