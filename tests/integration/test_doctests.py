"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jdcore
import jdplugins.robust
import jdplugins.standard
from tests.integration.extras import needs_more, skipping

PACKAGES = (jdcore, jdplugins.standard, jdplugins.robust)

MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)

FINDER = doctest.DocTestFinder(exclude_empty=True)

# Of the installed plugins only: other tests register methods of their own.
METHODS = [spec.name for plugin in jdcore.list_plugins() for spec in plugin.aggregators]


def examples(module: str) -> list[doctest.DocTest]:
    return [test for test in FINDER.find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", skipping(MODULES))
def test_the_examples_of_a_module_run(module: str) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples(module):
        runner.run(test, out=report.append)

    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_examples_are_found() -> None:
    importable = [module for module in MODULES if not needs_more(module)]
    found = {test.name for module in importable for test in examples(module)}

    assert "jdcore.registry.get_aggregator" in found
    assert "jdplugins.standard.mean.MeanWeighting" in found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_shows_an_example(name: str) -> None:
    spec = jdcore.describe(name)
    module, _, attribute = (spec.weighting or spec.aggregator or "").partition(":")

    assert f"{module}.{attribute}" in {test.name for test in examples(module)}
