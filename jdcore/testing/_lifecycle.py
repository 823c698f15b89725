"""State and copies of a method."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.protocols import Stateful
from jdcore.testing._case import Case, demand, demand_refusal


def survives_pickling_and_copying(case: Case) -> None:
    matrix = case.gauss()
    original = case.make(case.rows)
    case.call(original, matrix)
    # After a call, so that there is a state to be carried over.
    copies = pickle.loads(pickle.dumps(original)), copy.deepcopy(original)
    expected = case.call(original, matrix)
    for other in copies:
        demand(repr(other) == repr(original), f"the copy of {original} is {other}")
        demand(torch.equal(case.call(other, matrix), expected), "the copy behaves otherwise")


def is_stateful_as_declared(case: Case) -> None:
    stateful = isinstance(case.make(case.rows), Stateful)
    demand(stateful == case.spec.stateful, f"stateful is {stateful}, declared {case.spec.stateful}")


def continues_from_a_saved_state(case: Case) -> None:
    one = case.make(case.rows)
    # Some calls, as the first one of a method mostly sets its state up and no more.
    for seed in range(3):
        case.call(one, case.gauss(seed=seed))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = case.make(case.rows)
    # Into a fresh object, as a program that resumes has no other.
    loaded = torch.load(file, weights_only=True)
    two.load_state_dict(loaded)
    for state in (one.state_dict(), loaded):  # neither of them may be what an object goes on with
        _spoil(state)
    if case.spec.stochastic:
        for aggregator in (one, two):  # the generator is the caller's, not part of the state
            _reseed(aggregator)
    for seed in range(3, 6):
        matrix = case.gauss(seed=seed)
        demand(torch.equal(case.call(one, matrix), case.call(two, matrix)), f"step {seed} differs")


def _spoil(state: Mapping[str, Any]) -> None:
    """Write into all tensors of a state."""
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, Mapping):
            _spoil(value)


def _reseed(aggregator: Any) -> None:
    owner = aggregator if hasattr(aggregator, "generator") else aggregator.weighting
    owner.generator.manual_seed(7)


def resets_to_a_new_object(case: Case) -> None:
    used, new = case.make(case.rows), case.make(case.rows)
    case.call(used, case.gauss(seed=1))
    # A generator is no state: it goes on from where it is.
    used.reset()
    if case.spec.stochastic:
        _reseed(used)
        _reseed(new)
    matrix = case.gauss(seed=2)
    demand(
        torch.equal(case.call(used, matrix), case.call(new, matrix)),
        "reset() left something behind",
    )


def keeps_its_state_when_a_call_fails(case: Case) -> None:
    aggregator = case.make(case.rows)
    case.call(aggregator, case.gauss())
    before = repr(aggregator.state_dict())
    broken = case.gauss(seed=1)
    # A step with NaN is skipped by most loops: it must not poison the ones after it.
    broken[1, 2] = float("nan")
    case.call(aggregator, broken)
    demand(repr(aggregator.state_dict()) == before, "NaN input changed the state")
    try:
        aggregator(case.gauss()[0])
    except ParameterError:
        demand(repr(aggregator.state_dict()) == before, "a refused call changed the state")


def refuses_a_foreign_state(case: Case) -> None:
    aggregator = case.make(case.rows)
    case.call(aggregator, case.gauss())
    state = aggregator.state_dict()
    # As text, since dictionaries of tensors cannot be compared.
    before = repr(state)
    for label, foreign in foreign_states(state):
        demand_refusal(partial(aggregator.load_state_dict, foreign), label)
        demand(repr(aggregator.state_dict()) == before, f"{label} was half loaded")


def foreign_states(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """States that no object of the same kind has had, with their labels."""
    yield "a state with unknown keys", {"no_such_key": 1}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            yield f"NaN in {name!r}", {**state, name: value * torch.nan}
            yield f"a single number as {name!r}", {**state, name: value.new_ones(())}
        elif isinstance(value, float):
            yield f"NaN as {name!r}", {**state, name: math.nan}
