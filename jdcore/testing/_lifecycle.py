"""Construction, state, serialisation and self-description of a method."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import attrs
import torch

from jdcore.errors import ParameterError
from jdcore.protocols import Stateful
from jdcore.registry import registry
from jdcore.testing._case import Case, call, demand
from jdcore.validators import row_vector


def describes_itself(case: Case) -> None:
    cls = registry.aggregator_class(case.name)
    demand(cls.__name__ == case.spec.class_name, f"class {cls.__name__}, {case.spec.class_name}")
    demand(bool(cls.__doc__ and cls.__doc__.strip()), "the class has no docstring")
    demand(">>>" in (cls.__doc__ or ""), "the docstring has no runnable example")
    documented = cls.__doc__ or ""
    for parameter in inspect.signature(cls).parameters:
        if parameter != "check_finite":  # documented once, in the base class
            demand(f":param {parameter}:" in documented, f"{parameter!r} is not documented")


def shows_what_you_would_type(case: Case) -> None:
    aggregator = case.make(case.rows)
    scope: dict[str, Any] = {
        case.spec.class_name: registry.aggregator_class(case.name),
        "tensor": torch.tensor,
        "torch": torch,
    }
    shown = repr(aggregator)
    if case.spec.stochastic:
        return  # a generator has no literal
    demand(repr(eval(shown, scope)) == shown, f"{shown} does not evaluate to itself")


def survives_pickling_and_copying(case: Case) -> None:
    if case.spec.stochastic:
        return  # a torch.Generator can be neither pickled nor copied
    matrix = case.gauss()
    original = case.make(case.rows)
    call(original, matrix)
    copies = pickle.loads(pickle.dumps(original)), copy.deepcopy(original)
    expected = call(original, matrix)
    for other in copies:
        demand(repr(other) == repr(original), f"{other} is not {original}")
        demand(torch.equal(call(other, matrix), expected), "the copy behaves otherwise")


def checks_vectors_against_the_rows(case: Case) -> None:
    if case.spec.input == "matrix":
        return
    fields = attrs.fields(registry.weighting_class(case.name))
    for name in [f.name for f in fields if f.validator is row_vector]:
        _checks_vector(case, name)


def _checks_vector(case: Case, name: str) -> None:
    right, matrix = torch.ones(case.rows), case.gauss()
    too_short = case.make(case.rows, {name: right[1:]})
    elsewhere = case.make(case.rows, {name: right.to("meta")})
    weighting = case.make_weighting(case.rows, {name: right})
    _demand_error(lambda: too_short(matrix), name)
    _demand_error(lambda: elsewhere(matrix), name)
    _demand_error(lambda: case.make(case.rows, {name: right[None]}), name)
    _demand_error(lambda: setattr(weighting, name, right.long()), name)
    demand(getattr(weighting, name) is right, f"a refused {name} replaced the old one")


def _demand_error(action: Any, parameter: str) -> None:
    try:
        action()
    except ParameterError as error:
        demand(error.parameter == parameter, f"{error.parameter!r} is named, not {parameter!r}")
        return
    demand(False, f"a bad {parameter} should raise a ParameterError")


def is_stateful_as_declared(case: Case) -> None:
    stateful = isinstance(case.make(case.rows), Stateful)
    demand(stateful == case.spec.stateful, f"stateful is {stateful}, declared {case.spec.stateful}")


def continues_from_a_saved_state(case: Case) -> None:
    if not case.spec.stateful:
        return
    one = case.make(case.rows)
    for seed in range(3):
        call(one, case.gauss(seed=seed))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = case.make(case.rows)
    two.load_state_dict(torch.load(file, weights_only=True))
    if case.spec.stochastic:
        for aggregator in (one, two):  # the generator is the caller's, not part of the state
            _reseed(aggregator)
    for seed in range(3, 6):
        matrix = case.gauss(seed=seed)
        demand(torch.equal(call(one, matrix), call(two, matrix)), f"step {seed} differs")


def _reseed(aggregator: Any) -> None:
    getattr(aggregator, "weighting", aggregator).generator.manual_seed(7)


def resets_to_a_new_object(case: Case) -> None:
    if not case.spec.stateful:
        return
    used, new = case.make(case.rows), case.make(case.rows)
    call(used, case.gauss(seed=1))
    used.reset()
    if case.spec.stochastic:
        _reseed(used)
        _reseed(new)
    matrix = case.gauss(seed=2)
    demand(torch.equal(call(used, matrix), call(new, matrix)), "reset() left something behind")


def keeps_its_state_when_a_call_fails(case: Case) -> None:
    if not case.spec.stateful:
        return
    aggregator = case.make(case.rows)
    call(aggregator, case.gauss())
    before = repr(aggregator.state_dict())
    broken = case.gauss(seed=1)
    broken[1, 2] = float("nan")
    call(aggregator, broken)
    demand(repr(aggregator.state_dict()) == before, "NaN input changed the state")
    try:
        aggregator(case.gauss()[0])
    except ParameterError:
        demand(repr(aggregator.state_dict()) == before, "a refused call changed the state")


def refuses_a_foreign_state(case: Case) -> None:
    if not case.spec.stateful:
        return
    aggregator = case.make(case.rows)
    call(aggregator, case.gauss())
    before = repr(aggregator.state_dict())
    try:
        aggregator.load_state_dict({"no_such_key": 1})
    except ParameterError:
        demand(repr(aggregator.state_dict()) == before, "a refused state was half loaded")
        return
    demand(False, "a state with unknown keys should raise a ParameterError")
