"""Every public object says what it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import jdcore
from tests.integration.extras import skipping

PUBLIC_MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jdcore.__path__, "jdcore.")
    if not any(part.startswith("_") for part in module.name.split("."))
)

# Of the installed plugins only: other tests register methods of their own.
METHODS = [spec.name for plugin in jdcore.list_plugins() for spec in plugin.aggregators]


def public_objects(module: ModuleType) -> dict[str, Any]:
    own = [n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
    objects = {name: getattr(module, name) for name in names}
    return {name: o for name, o in objects.items() if inspect.isclass(o) or inspect.isfunction(o)}


def public_members(cls: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(cls)
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("jd"))
    }


@pytest.mark.parametrize("name", skipping(["jdcore", *PUBLIC_MODULES]))
def test_a_module_and_its_public_objects_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    for key, public in public_objects(module).items():
        if not public.__doc__:
            missing.append(f"{name}.{key}")
        if inspect.isclass(public) and public.__module__.startswith("jd"):
            members = public_members(public)
            missing += [f"{name}.{key}.{m}" for m in members if not inspect.getdoc(members[m])]

    assert missing == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_docstring_and_so_have_its_public_members(name: str) -> None:
    for cls in {type(a) for a in instances(name)}:
        members = public_members(cls)

        assert inspect.getdoc(cls)
        assert [m for m in members if not inspect.getdoc(members[m])] == []


def instances(name: str) -> list[Any]:
    spec = jdcore.describe(name)
    arguments = spec.example(max(2, spec.min_rows))
    made = [jdcore.get_aggregator(name, **arguments)]
    if spec.weighting is not None:
        made.append(jdcore.get_weighting(name, **arguments))
    return made
