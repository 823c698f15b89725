"""A default device that the user has set changes nothing inside the library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
