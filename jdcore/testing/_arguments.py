"""The arguments of a method: what they refuse, and how they travel as data."""

from __future__ import annotations

import json
from typing import Any

import attrs
import torch

from jdcore._methods import aggregator_class, weighting_class
from jdcore.config import to_config
from jdcore.config._arguments import Argument, arguments_of
from jdcore.errors import ParameterError
from jdcore.registry import get_aggregator, get_weighting
from jdcore.testing._case import Case, demand, demand_refusal
from jdcore.validators import row_vector


def refuses_unusable_arguments(case: Case) -> None:
    for argument in arguments_of(aggregator_class(case.name)).values():
        # No argument of any method accepts an object of no particular kind.
        nonsense = {argument.name: object()}
        _demand_error(lambda a=nonsense: case.make(case.rows, a), argument.name)
        _refuses_on_set(case, argument)


def _refuses_on_set(case: Case, argument: Argument) -> None:
    owner = case.make_weighting(case.rows) if case.spec.weighting else case.make(case.rows)
    if not attrs.has(type(owner)):
        return
    old = argument.of(owner)
    _demand_error(lambda: setattr(owner, argument.attribute, object()), argument.name)
    kept = argument.of(owner) is old
    demand(kept, f"a refused {argument.name} replaced the old one")


def checks_vectors_against_the_rows(case: Case) -> None:
    cls = weighting_class(case.name)
    for field in attrs.fields(cls) if attrs.has(cls) else ():
        if field.validator is row_vector:
            _checks_vector(case, field.name)


def _checks_vector(case: Case, name: str) -> None:
    right, matrix = torch.ones(case.rows, device="cpu"), case.gauss()
    # Only a call tells the number of rows, and the device.
    too_short = case.make(case.rows, {name: right[1:]})
    elsewhere = case.make(case.rows, {name: right.to("meta")})
    weighting = case.make_weighting(case.rows, {name: right})
    inputs = case.inputs(matrix)
    _demand_error(lambda: too_short(matrix, **inputs), name)
    _demand_error(lambda: elsewhere(matrix, **inputs), name)
    _demand_error(lambda: case.make(case.rows, {name: right[None]}), name)
    _demand_error(lambda: setattr(weighting, name, right.long()), name)
    demand(getattr(weighting, name) is right, f"a refused {name} replaced the old one")


def _demand_error(action: Any, parameter: str) -> None:
    named = demand_refusal(action, f"a bad {parameter}").parameter
    demand(named == parameter, f"{named!r} is named, not {parameter!r}")


def survives_a_config_round_trip(case: Case) -> None:
    _makes_the_round_trip(case, {})
    for argument in arguments_of(aggregator_class(case.name)).values():
        if argument.accepts("Tensor"):
            _makes_the_round_trip(case, {argument.name: _usable_vector(case, argument.name)})


def _usable_vector(case: Case, name: str) -> torch.Tensor:
    """A vector in float64, with one entry per objective; or per objective but the first."""
    wide = torch.linspace(0.1, 1.0, case.rows, dtype=torch.float64, device="cpu")
    try:
        case.call(case.make(case.rows, {name: wide}), case.gauss())
    except ParameterError:
        return wide[1:]
    return wide


def _makes_the_round_trip(case: Case, arguments: dict[str, Any]) -> None:
    original = case.make(case.rows, arguments)
    omit = ["generator"] if case.spec.stochastic else []
    # Through text, as files have it: tuples come back as lists, and keys as strings.
    config = json.loads(json.dumps(to_config(original, omit=omit)))
    rebuilt = get_aggregator(config, **{name: _generator() for name in omit})
    again = to_config(rebuilt, omit=omit)
    demand(again == config, f"{config} became {again}")
    demand(case.spec.stochastic or repr(rebuilt) == repr(original), f"{original} became {rebuilt}")
    matrix = case.gauss()
    demand(
        torch.equal(case.call(original, matrix), case.call(rebuilt, matrix)), "it behaves otherwise"
    )
    if case.spec.weighting is not None:
        weighting = get_weighting(config, **{name: _generator() for name in omit})
        demand(to_config(weighting, omit=omit) == config, f"{config} became {weighting}")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)  # the seed of case.make
