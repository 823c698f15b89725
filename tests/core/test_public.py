"""What is public is in the reference, docs/api.md, and the other way round."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import jdcore
from jdcore import errors, protocols

ROOT = Path(__file__).parents[2]

# Rooms behind the public ones, and programs.
INTERNAL = ("jdcore.graph", "jdcore.cli", "jdcore.demo", "jdcore.bench")

# Lightning, matplotlib: what these modules export is read without importing them.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jdcore.__path__, "jdcore.", onerror=lambda name: None)
    if not re.search(r"\._", module.name) and not module.name.startswith(INTERNAL)
)


def exported(module: str) -> list[str]:
    """The names in the ``__all__`` of a module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def documented() -> dict[str, set[str]]:
    """By module, the names that the reference shows."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = {}
    for module, block in re.findall(r"automodule:: (\S+)\n((?:   :.*\n)*)", text):
        options = dict(re.findall(r":([\w-]+):[ ]*(.*)", block))
        names = _listed(options.get("members", "")) or set(exported(module))
        shown = names - _listed(options.get("exclude-members", ""))
        found[module] = shown if "members" in options else set()
    return found


def _listed(names: str) -> set[str]:
    return {name.strip() for name in names.split(",") if name.strip()}


@pytest.mark.parametrize("module", ["jdcore", *MODULES])
def test_what_a_module_exports_is_in_the_reference(module: str) -> None:
    shown = documented()
    places = ("jdcore", "jdcore.autogram", module)
    found = [names for m, names in shown.items() if m in places or m.startswith(f"{module}.")]

    assert set(exported(module)) - set[str]().union(*found) == set()


@pytest.mark.parametrize("module", documented())
def test_what_the_reference_shows_is_exported(module: str) -> None:
    assert documented()[module] - set(exported(module)) == set()


def test_the_reference_shows_no_internal_module() -> None:
    assert documented().keys() <= {"jdcore", *MODULES}


@pytest.mark.parametrize("module", ["jdcore", "jdcore.aggregation", "jdcore.autojac.transform"])
def test_what_is_exported_has_a_docstring(module: str) -> None:
    loaded = importlib.import_module(module)
    things = {name: getattr(loaded, name) for name in exported(module)}
    own = {n: t for n, t in things.items() if inspect.isclass(t) or inspect.isfunction(t)}

    assert [name for name, thing in own.items() if not (thing.__doc__ or "").strip()] == []


def test_every_protocol_is_exported() -> None:
    own = [
        n
        for n, t in vars(protocols).items()
        if inspect.isclass(t) and t.__module__ == "jdcore.protocols"
    ]

    assert sorted(own) == protocols.__all__


def test_every_error_is_exported_by_the_package() -> None:
    assert set(errors.__all__) - {"warn"} <= set(jdcore.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert jdcore.__version__ == version("jdcore")
    assert not hasattr(jdcore, "__versoin__")
