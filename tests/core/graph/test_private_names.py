"""Names of torch that are no public interface are read in one room, whatever version comes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted([*ROOT.glob("jdcore/**/*.py"), *ROOT.glob("jdplugins/*/src/**/*.py")])


def private_names(source: str) -> Iterator[str]:
    """
    Names such as ``torch._C._x``, used or imported.

    Operations on lists of tensors, ``torch._foreach_*``, are not among them: they are documented,
    and the optimizers of torch are made of them.
    """
    for node in ast.walk(ast.parse(source)):
        for name in _names(node):
            module, *parts = name.split(".")
            private = [p for p in parts if p.startswith("_") and not p.startswith("_foreach_")]
            if module == "torch" and private:
                yield name


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        chain = ast.unparse(node)
        return [chain] if chain.replace(".", "").isidentifier() else []  # no call in between
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_private_names_are_found() -> None:
    source = "import torch._dynamo\nfrom torch.fx import _x\ntorch._C.f()\ntorch._foreach_norm(x)\n"

    assert list(private_names(source)) == ["torch._dynamo", "torch.fx._x", "torch._C.f", "torch._C"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_of_torch_are_in_the_room_of_the_graph_alone(path: Path) -> None:
    if not path.is_relative_to(ROOT / "jdcore" / "graph"):
        assert list(private_names(path.read_text(encoding="utf-8"))) == []
