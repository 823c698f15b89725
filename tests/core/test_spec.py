from __future__ import annotations

import pytest

from jdcore import AggregatorSpec, ParameterError, ParameterTypeError, Property, SolverSpec
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
        ("summary", " ", "`summary` must be a non-empty string, got ' '"),
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
        ("api_version", 2, "`api_version` must be 1, the plugin interface of this jdcore, got 2"),
    ],
)
def test_a_malformed_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        AggregatorSpec(**VALID | {field: value})


def test_a_solver_spec_is_checked_likewise() -> None:
    fields = {"name": "native", "problem": "dual_cone", "summary": "s", "api_version": 1}

    with pytest.raises(
        ParameterTypeError, match="`factory` must be a 'module:attribute' string, got"
    ):
        SolverSpec(**fields, factory=object)  # type: ignore[arg-type]
    assert SolverSpec(**fields, factory="package.module:Solver").problem == "dual_cone"
