from __future__ import annotations

import attrs
import pytest

from jdcore import (
    AggregatorSpec,
    GramianRuleSpec,
    ParameterError,
    ParameterTypeError,
    Property,
    Reference,
    ScalarizerSpec,
    SolverSpec,
)
from jdcore.spec import normalize_name

VALID = {
    "name": "nash_mtl",
    "summary": "Does something.",
    "weighting": "package.module:NashMTLWeighting",
    "api_version": 1,
}


@pytest.mark.parametrize("spelling", ["nash_mtl", "NashMTL", "nash-mtl", "NASH_MTL"])
def test_all_spellings_of_a_name_have_the_same_key(spelling: str) -> None:
    assert normalize_name(spelling) == "nashmtl"


def test_class_name_and_input_follow_from_the_factory() -> None:
    weighted = AggregatorSpec(**VALID)
    matrix = AggregatorSpec(**VALID | {"weighting": None, "aggregator": "package:GradDrop"})

    assert (weighted.class_name, weighted.input) == ("NashMTL", "gramian")
    assert (matrix.class_name, matrix.input) == ("GradDrop", "matrix")


def test_a_spec_cannot_be_changed() -> None:
    spec = AggregatorSpec(
        **VALID, properties=[Property.NON_CONFLICTING], expected_failures={"a": "b"}
    )

    with pytest.raises(AttributeError):
        spec.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.expected_failures["c"] = "d"  # type: ignore[index]
    assert spec.properties == frozenset({Property.NON_CONFLICTING})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "name",
            "NashMTL",
            "`name` must be a lower snake case name such as 'nash_mtl', got 'NashMTL'",
        ),
        ("name", 3, "`name` must be a lower snake case name such as 'nash_mtl', got 3"),
        ("summary", " ", "`summary` must be one line of text, got ' '"),
        ("summary", "Two\nlines.", "`summary` must be one line of text, got 'Two"),
        ("weighting", "a..b:CWeighting", "`weighting` must be a 'module:attribute' string"),
        ("weighting", "module.NashMTLWeighting", "`weighting` must be a 'module:attribute' string"),
        (
            "weighting",
            "module:NashMTL",
            "`weighting` must be a class whose name ends in 'Weighting'",
        ),
        (
            "weighting",
            None,
            "`weighting` must be given if and only if `aggregator` is not, got None",
        ),
        ("aggregator", "module:NashMTL", "`weighting` must be given if and only if `aggregator`"),
        ("aliases", ["Not Snake"], "`aliases` must be a lower snake case name"),
        (
            "aliases",
            "foo",
            "`aliases` must be a tuple of names, got 'foo'. Write a tuple: \\('foo',",
        ),
        ("aliases", None, "`aliases` must be a tuple of names, got None"),
        ("requires", "scipy", "`requires` must be a tuple of names of distributions, got 'scipy'"),
        (
            "requires",
            ["scipy>=1"],
            "`requires` must be the name of a distribution .* got 'scipy>=1'",
        ),
        ("reference", {}, "`reference` must be a Reference or None, got {}"),
        ("stateful", "no", "`stateful` must be a bool, got 'no'"),
        ("stateful", None, "`stateful` must be a bool, got None"),
        ("stochastic", 1, "`stochastic` must be a bool, got 1"),
        ("losses", "yes", "`losses` must be a bool, got 'yes'"),
        ("cross_gramian", 0, "`cross_gramian` must be a bool, got 0"),
        ("wrapper", "", "`wrapper` must be a bool, got ''"),
        ("min_rows", "2", "`min_rows` must be an int, got '2'"),
        ("min_rows", True, "`min_rows` must be an int, got True"),
        ("min_rows", -3, "`min_rows` must be >= 1, got -3"),
        ("min_rows", 0, "`min_rows` must be >= 1, got 0"),
        (
            "properties",
            ("non_conflicting",),
            "`properties` must be a set of Property members, got .'non_conflicting',.*"
            "Write jdcore.Property.NON_CONFLICTING",
        ),
        ("properties", "robust", "`properties` must be a set of Property members, got 'robust'"),
        ("properties", [[]], "`properties` must be a set of Property members"),
        ("properties", Property.ROBUST, "`properties` must be a set of Property members"),
        ("example", {}, "`example` must be a function that makes keyword arguments for m rows"),
        ("expected_failures", ["check"], "`expected_failures` must be a mapping of strings to"),
        ("expected_failures", {"check": 1}, "`expected_failures` must be a mapping of strings to"),
        ("api_version", True, "`api_version` must be 1, the plugin interface of this jdcore"),
        ("api_version", 2, "`api_version` must be 1, the plugin interface of this jdcore, got 2"),
    ],
)
def test_a_malformed_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        AggregatorSpec(**VALID | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scalarizer", "module.Largest"),
        ("positive", "yes"),
        ("trainable", 1),
        ("surrogate", None),
        ("advanced_by", "two words"),
        ("advanced_by", 3),
        ("requires", "scipy"),
        ("stateful", "no"),
    ],
)
def test_a_malformed_field_of_a_scalarizer_is_named(field: str, value: object) -> None:
    valid = {"name": "largest", "summary": "s", "scalarizer": "module:Largest", "api_version": 1}

    assert ScalarizerSpec(**valid, advanced_by="after_step").advanced_by == "after_step"
    with pytest.raises(ParameterError, match=f"Parameter `{field}` must be") as caught:
        ScalarizerSpec(**valid | {field: value})
    assert caught.value.parameter == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("title", ""), ("year", "2024"), ("year", True), ("year", 0), ("url", "arxiv"), ("url", None)],
)
def test_a_malformed_field_of_a_reference_is_named(field: str, value: object) -> None:
    valid = {"title": "A paper", "year": 2024, "url": "https://arxiv.org/pdf/2406.16232"}

    with pytest.raises(ParameterError, match=f"Parameter `{field}` must be"):
        Reference(**valid | {field: value})


@pytest.mark.parametrize("kind", [AggregatorSpec, ScalarizerSpec, SolverSpec, GramianRuleSpec])
def test_no_field_of_a_spec_is_unchecked(kind: type) -> None:
    unchecked = [field.name for field in attrs.fields(kind) if field.validator is None]

    assert unchecked == []


def test_a_solver_spec_is_checked_likewise() -> None:
    fields = {"name": "native", "problem": "dual_cone", "summary": "s", "api_version": 1}

    with pytest.raises(
        ParameterTypeError, match="`factory` must be a 'module:attribute' string, got"
    ):
        SolverSpec(**fields, factory=object)  # type: ignore[arg-type]
    with pytest.raises(ParameterTypeError, match="`variants` must be a bool, got 'no'"):
        SolverSpec(**fields, factory="package.module:Solver", variants="no")  # type: ignore[arg-type]
    assert SolverSpec(**fields, factory="package.module:Solver").problem == "dual_cone"
