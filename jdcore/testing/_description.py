"""What a method says of itself, and what it costs to ask."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from functools import cache
from typing import Any

import torch

import jdcore.aggregation
from jdcore._methods import aggregator_class
from jdcore._registry import registry
from jdcore.testing._case import Case, demand


def describes_itself(case: Case) -> None:
    cls = aggregator_class(case.name)
    demand(cls.__name__ == case.spec.class_name, f"class {cls.__name__}, {case.spec.class_name}")
    demand(bool(cls.__doc__ and cls.__doc__.strip()), "the class has no docstring")
    demand(">>>" in (cls.__doc__ or ""), "the docstring has no runnable example")
    documented = cls.__doc__ or ""
    if case.spec.reference is not None:
        url = case.spec.reference.url
        demand(url in documented, f"the docstring does not link the reference, {url}")
    for parameter in inspect.signature(cls).parameters:
        if parameter != "check_finite":  # documented once, in the base class
            demand(f":param {parameter}:" in documented, f"{parameter!r} is not documented")


class Names(dict[str, Any]):
    """
    Names that a user has imported: torch, those given, and all of a package beside.

    :param package: A package that exports registered methods, such as ``jdcore.aggregation``.
    :param given: Names that come first.
    """

    def __init__(self, package: Any, given: dict[str, Any]) -> None:
        super().__init__(given, tensor=torch.tensor, torch=torch)
        self.package = package

    def __missing__(self, name: str) -> Any:
        if not hasattr(self.package, name):
            raise KeyError(name)
        return getattr(self.package, name)


def shows_what_you_would_type(case: Case) -> None:
    names = Names(jdcore.aggregation, {case.spec.class_name: aggregator_class(case.name)})
    shown = repr(case.make(case.rows))
    demand(repr(eval(shown, {}, names)) == shown, f"{shown} does not evaluate to itself")


def is_listed_without_being_imported(case: Case) -> None:
    modules = modules_after_listing(registry.aggregator(case.name).distribution)
    factory = case.spec.weighting or case.spec.aggregator or ""
    for module in ("torch", factory.partition(":")[0]):
        demand(module not in modules, f"listing the plugin imports {module}")


@cache
def modules_after_listing(distribution: str) -> frozenset[str]:
    """Names of all modules that listing the plugins of a distribution imports."""
    code = "import jdcore, sys; jdcore.list_plugins(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"JDCORE_PLUGINS": distribution},
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(done.stdout.split())
