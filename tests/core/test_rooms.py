"""Who imports whom is what CONTRIBUTING.md says, and without circles."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from attrs import field, frozen

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in sorted(ROOT.glob("jdcore/**/*.py")) if "_template" not in path.parts]


@frozen
class Row:
    """A row of the table."""

    rooms: tuple[str, ...]
    eager: frozenset[str] = field(converter=frozenset)
    when_called: frozenset[str] = field(converter=frozenset)
    everything: bool


def table() -> list[Row]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition("| room | what is there |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = []
    for line in lines:
        rooms, _, imports = line.strip("|").rsplit("|", 2)
        eager, _, late = imports.partition("when called:")
        rows.append(Row(_rooms(rooms), _rooms(eager), _rooms(late), "everything" in imports))
    return rows


def _rooms(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`(\w+)`", cell))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The rooms that a module imports, and whether it does so as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node not in for_types:
            for name in _modules(node):
                if name.startswith("jdcore."):
                    yield name.split(".")[1], node in tree.body


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "jdcore":
        return [f"jdcore.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "jdcore").parts[0].removesuffix(".py")


@cache
def found() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """By room, what it imports as it is imported, and what it imports later."""
    eager, late = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for path in SOURCES:
        room = room_of(path)
        for other, at_once in imports(path):
            if other != room:
                (eager if at_once else late)[room].add(other)
    return eager, late


def test_every_room_is_in_the_table_once() -> None:
    listed = [room for row in table() for room in row.rooms]

    assert sorted(listed) == sorted({room_of(path) for path in SOURCES} - {"__init__"})


@pytest.mark.parametrize("row", table(), ids=lambda row: row.rooms[0])
def test_rooms_import_what_the_table_says(row: Row) -> None:
    eager, late = found()
    free = {*table()[0].rooms, *row.rooms}
    at_once = set[str]().union(*(eager[room] for room in row.rooms)) - free
    later = set[str]().union(*(late[room] for room in row.rooms)) - free - at_once
    if row.everything:
        above = [room for other in table()[: table().index(row)] for room in other.rooms]
        assert at_once | later <= {*above, *row.rooms}
    else:
        assert (at_once, later) == (row.eager, row.when_called)


def test_no_room_imports_itself_by_way_of_others() -> None:
    eager, _ = found()

    TopologicalSorter(eager).prepare()  # raises a CycleError if one does


def test_plugins_import_public_modules_of_the_core_alone() -> None:
    for path in sorted(ROOT.glob("jdplugins/*/src/**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [name for node in ast.walk(tree) for name in _modules(node)]
        private = [n for n in names if re.match(r"jdcore\..*\b_", n)]
        assert private == [], path


def test_no_test_in_a_comprehension_makes_the_same_set_anew_for_each_item() -> None:
    """Graphs have thousands of nodes, and so have sets of them: their time would be squared."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}" for path in SOURCES for line, text in _anew(path)
    ]
    assert found == []


def _anew(path: Path) -> Iterator[tuple[int, str]]:
    for made in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        generators: list[ast.comprehension] = getattr(made, "generators", [])
        items = {name for generator in generators for name in _names(generator.target)}
        tests = [test for generator in generators for test in generator.ifs]
        for compared in [node for test in tests for node in ast.walk(test)]:
            if isinstance(compared, ast.Compare):
                for right in compared.comparators:
                    new = isinstance(right, ast.BinOp | ast.Set | ast.SetComp | ast.ListComp)
                    if new and not items & _names(right):
                        yield right.lineno, ast.unparse(right)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
