from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jdcore._discovery import AGGREGATOR
from jdcore._gramian_rules import RUNTIME
from jdcore._registry import registry
from jdcore.spec import AggregatorSpec, Property
from jdcore.testing import _arguments, _description, _laws, _lifecycle, _properties
from jdcore.testing._case import Case
from jdcore.testing._check import ConformanceCheck, checks_by, distribution_test

Check = Callable[[Case], None]

_ALWAYS: tuple[Check, ...] = (
    _laws.keeps_dtype_and_shape,
    _laws.agrees_between_dtypes,
    _laws.works_on_accelerators,
    _laws.leaves_its_input_alone,
    _laws.handles_no_rows,
    _laws.handles_no_columns,
    _laws.handles_degenerate_rows,
    _laws.refuses_malformed_matrices,
    _laws.gives_nan_for_nonfinite_input,
    _laws.raises_for_nonfinite_input_when_asked,
    _laws.is_deterministic,
    _laws.gives_the_same_by_blocks,
    _properties.differentiates_as_declared,
    _description.describes_itself,
    _arguments.refuses_unusable_arguments,
    _arguments.survives_a_config_round_trip,
    _lifecycle.is_stateful_as_declared,
)

_OF_WEIGHTINGS: tuple[Check, ...] = (
    _laws.weighting_agrees_with_aggregator,
    _laws.weighting_keeps_its_laws,
    _arguments.checks_vectors_against_the_rows,
)

_OF_STATE: tuple[Check, ...] = (
    _lifecycle.continues_from_a_saved_state,
    _lifecycle.resets_to_a_new_object,
    _lifecycle.keeps_its_state_when_a_call_fails,
    _lifecycle.refuses_a_foreign_state,
)

# A torch.Generator has no literal, and can be neither pickled nor copied.
_WITHOUT_GENERATOR: tuple[Check, ...] = (
    _description.shows_what_you_would_type,
    _lifecycle.survives_pickling_and_copying,
)

_DECLARED: dict[Property, Check] = {
    Property.NON_CONFLICTING: _properties.never_conflicts,
    Property.LINEAR_UNDER_SCALING: _properties.is_linear_under_scaling,
    Property.STRONGLY_STATIONARY: _properties.stops_only_where_strongly_stationary,
    Property.PERMUTATION_INVARIANT: _properties.is_permutation_invariant,
    Property.SCALE_EQUIVARIANT: _properties.is_scale_equivariant,
    Property.ROBUST: _properties.withstands_an_adversary,
}


def checks_of(name: str) -> list[ConformanceCheck]:
    """
    The checks that apply to a method: the laws of the contract and the properties it declares.

    :raises ConformanceError: If its spec expects the failure of a check that does not apply.
    """
    case = Case(name)
    return checks_by(_applicable(name, case.spec), name, case, case.spec.expected_failures)


def _applicable(name: str, spec: AggregatorSpec) -> Iterator[Check]:
    yield from _ALWAYS
    yield _laws.handles_one_row if spec.min_rows == 1 else _laws.refuses_too_few_rows
    if spec.weighting is not None:
        yield from _OF_WEIGHTINGS
    if spec.losses or spec.cross_gramian:
        yield _laws.is_refused_without_what_it_needs
    if spec.losses:
        yield _laws.checks_the_losses
    if spec.stateful:
        yield from _OF_STATE
    if not spec.stochastic:
        yield from _WITHOUT_GENERATOR
    if registry.entry(AGGREGATOR, name).distribution != RUNTIME:
        yield _description.is_listed_without_being_imported
    yield from (check for prop, check in _DECLARED.items() if prop in spec.properties)


def conformance_tests(distribution: str) -> Any:
    """
    Make a pytest test that runs every check on every method of a distribution.

    One line in a test file is all it takes::

        test_conformance = conformance_tests("my-methods")

    :param distribution: Name of an installed distribution that provides methods.
    :returns: A parametrized test function.
    :raises ConformanceError: If the distribution provides no method.
    """
    return distribution_test(distribution, "method", lambda plugin: plugin.aggregators, checks_of)
