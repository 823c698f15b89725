"""What every method of this distribution must come with, beside what the conformance kit checks."""

from __future__ import annotations

from pathlib import Path

import pytest

import jdcore

ROOT = Path(__file__).parents[3]
SPECS = [
    spec
    for record in jdcore.list_plugins()
    if record.distribution == "jdplugins-standard"
    for spec in record.aggregators
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_has_a_test_of_known_values(spec: jdcore.AggregatorSpec) -> None:
    test = Path(__file__).parent / f"test_{spec.name}.py"

    assert test.read_text().count("def test_") >= 2


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_changelog_mentions_it(spec: jdcore.AggregatorSpec) -> None:
    assert f"`{spec.class_name}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_method_of_the_literature_names_its_paper(spec: jdcore.AggregatorSpec) -> None:
    common_knowledge = {"constant", "mean", "per_group", "present_tasks", "sum"}

    assert (spec.reference is None) == (spec.name in common_knowledge)
