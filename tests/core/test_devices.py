"""A default device that the user has set changes nothing inside the library."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("jdcore/**/*.py"), *ROOT.glob("jdplugins/*/src/**/*.py")])

# Functions of torch that make a tensor on the default device unless they are given another one.
# `from_numpy`, and what ends in `_like` or begins with `new_`, have a device to begin with.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
# Programs of the project, which own their process: nobody sets a default device there before them.
PROGRAMS = ("jdcore/demo/", "jdcore/bench/", "jdcore/_commands/")


def factories_without_device(source: str) -> Iterator[int]:
    """Lines of calls such as ``torch.zeros(3)``."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in FACTORIES
            and not any(k.arg in ("device", "out", None) for k in node.keywords)
        ):
            yield node.lineno


def test_calls_without_a_device_are_found() -> None:
    source = "torch.zeros(3)\ntorch.zeros(3, device=d)\nx.zeros(3)\ntorch.tensor([1.0])\n"

    assert list(factories_without_device(source)) == [1, 4]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_new_tensor_is_told_its_device(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(PROGRAMS):
        return
    lines = factories_without_device(path.read_text(encoding="utf-8"))

    assert [f"{name}:{line}" for line in lines] == []


class Problem:
    """Two losses on one trunk."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(5, 3)
        self.trunk = nn.Linear(3, 4)
        heads = [nn.Linear(4, 1) for _ in range(2)]
        self.features = self.trunk(self.x)
        self.losses = [head(self.features).square().mean() for head in heads]


def weigh(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


def by_backward(problem: Problem) -> None:
    backward(problem.losses)
    jac_to_grad(problem.trunk.parameters(), GramianAggregator(weigh))


def by_mtl_backward(problem: Problem) -> None:
    mtl_backward(problem.losses, problem.features)
    jac_to_grad(problem.trunk.parameters(), GramianAggregator(weigh))


def by_gramian_backward(problem: Problem) -> None:
    gramian_backward(problem.losses, weigh)


def by_engine(problem: Problem) -> None:
    Engine(problem.trunk, batch_dim=None).backward(torch.stack(problem.losses), weigh)


def by_engine_with_samples(problem: Problem) -> None:
    losses = problem.trunk(problem.x).square().mean(dim=1)
    Engine(problem.trunk, batch_dim=0).backward(losses, weigh)


@pytest.mark.parametrize(
    "step",
    [by_backward, by_mtl_backward, by_gramian_backward, by_engine, by_engine_with_samples],
    ids=lambda step: step.__name__,
)
def test_a_default_device_changes_no_step(step: Callable[[Problem], None]) -> None:
    expected, problem = Problem(), Problem()
    step(expected)

    with torch.device("meta"):
        step(problem)

    for parameter, same in zip(
        problem.trunk.parameters(), expected.trunk.parameters(), strict=True
    ):
        assert torch.equal(parameter.grad, same.grad)  # type: ignore[arg-type]
