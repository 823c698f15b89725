"""What a method says of itself, and what it costs to ask."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

import jdcore.aggregation
from jdcore._discovery import AGGREGATOR
from jdcore._methods import aggregator_class
from jdcore._registry import registry
from jdcore.spec import AggregatorSpec, ScalarizerSpec
from jdcore.testing._case import Case, ConformanceError, demand


def describes_itself(case: Case) -> None:
    # Documented once, in the base class.
    demand_description(aggregator_class(case.name), case.spec, elsewhere=("check_finite",))


def demand_description(
    cls: type, spec: AggregatorSpec | ScalarizerSpec, elsewhere: Sequence[str] = ()
) -> None:
    """
    Demand that a class has the name that its spec tells, and that its docstring tells the rest.

    :param elsewhere: Parameters that are described elsewhere.
    :raises ConformanceError: If the docstring lacks an example, the reference or a parameter, or an
        example does not print what it says.
    """
    documented = cls.__doc__ or ""
    demand(cls.__name__ == spec.class_name, f"class {cls.__name__}, {spec.class_name}")
    demand(bool(documented.strip()), "the class has no docstring")
    if spec.reference is not None:
        url = spec.reference.url
        demand(url in documented, f"the docstring does not link the reference, {url}")
    for parameter in inspect.signature(cls).parameters:
        if parameter not in elsewhere:
            demand(f":param {parameter}:" in documented, f"{parameter!r} is not documented")
    _demand_true_examples(cls)


def _demand_true_examples(cls: type) -> None:
    # A composed aggregator has the docstring of its weighting, whose module knows more names.
    module = sys.modules[getattr(cls, "weighting_class", cls).__module__]
    parser = doctest.DocTestParser()
    try:
        test = parser.get_doctest(cls.__doc__ or "", vars(module).copy(), cls.__name__, None, None)
    except ValueError as error:
        raise ConformanceError(f"an example in the docstring is malformed: {error}") from None
    demand(bool(test.examples), "the docstring has no runnable example")
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    # Examples may seed the default generator, which is that of the program that runs the checks.
    with torch.random.fork_rng(devices=[]):
        runner.run(test, out=report.append)
    demand(not runner.failures, f"an example in the docstring is wrong:\n{''.join(report)}")


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
    demand_expression(repr(case.make(case.rows)), names)


def demand_expression(shown: str, names: Names) -> None:
    """
    Demand that what an object is shown as makes it.

    :raises ConformanceError: If it makes something else, or nothing.
    """
    try:
        again = repr(eval(shown, {}, names))
    except (SyntaxError, NameError, KeyError) as error:
        raise ConformanceError(f"its repr, {shown}, is no expression: {error}") from None
    # By its text, since methods are compared by identity.
    demand(again == shown, f"its repr, {shown}, makes {again}")


def is_listed_without_being_imported(case: Case) -> None:
    modules = modules_after_listing(registry.entry(AGGREGATOR, case.name).distribution)
    factory = case.spec.weighting or case.spec.aggregator or ""
    for module in ("torch", factory.partition(":")[0]):
        demand(module not in modules, f"listing the plugin imports {module}")


@cache
def modules_after_listing(distribution: str) -> frozenset[str]:
    """Names of all modules that listing the plugins of a distribution imports."""
    # In a process of its own, as this one has imported the methods long ago.
    code = "import jdcore, sys; jdcore.list_plugins(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        # This plugin alone: others may import what they like.
        env=os.environ | {"JDCORE_PLUGINS": distribution},
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(done.stdout.split())
