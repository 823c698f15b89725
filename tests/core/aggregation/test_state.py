from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from torch import Tensor

from jdcore import ParameterError, ParameterTypeError, Stateful, autogram, monitor
from jdcore._methods import ComposedAggregator, compose
from jdcore.aggregation import (
    GramianAggregator,
    GramianWeighting,
    HistoryAggregator,
    NestedState,
    StateFields,
    as_module,
    state_field,
)
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._nested_state import state_kept
from jdcore.autojac import backward, jac_to_grad
from jdcore.validators import integer


@define(eq=False)
class Averaging(StateFields, GramianWeighting):
    """Average of the diagonals seen so far."""

    factor: float = field(default=1.0)
    calls: int = state_field(int, validator=integer(0))
    share: float = state_field(float)
    total: Tensor = state_field(lambda: torch.zeros(0, dtype=torch.float64))

    def compute(self, gramian: np.ndarray) -> np.ndarray:
        total = np.diagonal(gramian) + (self.total.numpy() if self.calls else 0.0)
        if gramian[0, 0] == 13.0:
            raise RuntimeError("thirteen")
        self.total, self.calls, self.share = torch.from_numpy(total), self.calls + 1, 0.5
        return self.factor * total / self.calls


@define(eq=False)
class Stateless(GramianWeighting):
    def compute(self, gramian: np.ndarray) -> np.ndarray:
        return np.ones(len(gramian))


def used(**arguments: Any) -> Averaging:
    weighting = Averaging(**arguments)
    weighting(torch.diag(torch.tensor([1.0, 3.0])))
    return weighting


def test_state_is_no_argument_and_not_shown() -> None:
    assert repr(used(factor=2.0)) == "Averaging(factor=2.0)"
    with pytest.raises(TypeError):
        Averaging(calls=3)


def test_the_protocol_is_satisfied_exactly_by_classes_with_state() -> None:
    assert isinstance(Averaging(), Stateful)
    assert not isinstance(Stateless(), Stateful)


def test_the_state_is_tensors_and_plain_numbers_by_field_name() -> None:
    state = used().state_dict()

    assert list(state) == ["calls", "share", "total"]
    assert (state["calls"], state["share"], state["total"].tolist()) == (1, 0.5, [1.0, 3.0])


def test_a_fresh_object_continues_from_a_file() -> None:
    one, two = used(), Averaging()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)

    two.load_state_dict(torch.load(file, weights_only=True))

    gramian = torch.diag(torch.tensor([5.0, 5.0]))
    assert two(gramian).tolist() == one(gramian).tolist() == [3.0, 4.0]


def test_reset_returns_to_a_new_object_but_keeps_arguments() -> None:
    weighting = used(factor=2.0)

    weighting.reset()

    assert repr(weighting.state_dict()) == repr(Averaging().state_dict())
    assert weighting.factor == 2.0


def test_new_objects_do_not_share_their_initial_tensors() -> None:
    assert Averaging().total is not Averaging().total


def test_saved_and_restored_tensors_are_copies() -> None:
    one, two = used(), Averaging()
    saved = one.state_dict()
    two.load_state_dict(saved)

    saved["total"].zero_()

    assert one.total.tolist() == two.total.tolist() == [1.0, 3.0]


def test_tensors_are_restored_in_the_dtype_of_the_field() -> None:
    weighting = Averaging()

    weighting.load_state_dict({"calls": 2, "share": 1, "total": torch.ones(2).half()})

    assert weighting.total.dtype == torch.float64
    assert type(weighting.share) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"with the keys \['calls', 'share', 'total'\], got the keys"),
        ({"calls": None}, "`calls` must be a plain int"),
        ({"calls": 1.5}, "`calls` must be a plain int"),
        ({"calls": True}, "`calls` must be a plain int"),
        ({"calls": -1}, "`calls` must be >= 0"),
        ({"share": "half"}, "`share` must be a plain float"),
        ({"share": math.nan}, "`share` must be free of NaN"),
        ({"share": -math.inf}, "`share` must be finite"),
        ({"share": 10**400}, "`share` must be in the range of float"),
        ({"total": [1.0, 2.0]}, "`total` must be a Tensor"),
        ({"total": torch.tensor([1.0, math.nan])}, "`total` must be free of NaN"),
        ({"total": torch.tensor([1.0, math.inf])}, "`total` must be finite"),
        ({"total": torch.tensor([1j, 2])}, "`total` must be a dense Tensor that float64 can hold"),
        (
            {"total": torch.ones(2, device="meta")},
            "`total` must be a dense Tensor that float64 can",
        ),
        ({"total": torch.ones(2).to_sparse()}, "`total` must be a dense Tensor that float64 can"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(
    change: dict[str, Any], message: str
) -> None:
    weighting = used()
    before = repr(weighting.state_dict())
    state = {**Averaging().state_dict(), **change}

    with pytest.raises(ParameterError, match=message):
        weighting.load_state_dict(state)

    assert repr(weighting.state_dict()) == before


def test_missing_keys_and_other_types_are_refused() -> None:
    weighting = used()
    state = weighting.state_dict()
    del state["share"]

    with pytest.raises(ParameterError, match="`state` must be a mapping with the keys"):
        weighting.load_state_dict(state)
    with pytest.raises(ParameterTypeError, match="`state` must be a mapping"):
        weighting.load_state_dict([1, 2])
    assert weighting.calls == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_call_with_non_finite_input_leaves_the_state_alone(bad: float) -> None:
    weighting = used()
    before = repr(weighting.state_dict())

    assert bool(weighting(torch.diag(torch.tensor([bad, 1.0]))).isnan().all())

    assert repr(weighting.state_dict()) == before


def test_a_call_that_raises_leaves_the_state_alone() -> None:
    weighting = used()
    before = repr(weighting.state_dict())

    with pytest.raises(RuntimeError, match="thirteen"):
        weighting(torch.diag(torch.tensor([13.0, 1.0])))

    assert repr(weighting.state_dict()) == before


def composed(weighting_class: type) -> type[ComposedAggregator]:
    return compose("Composed", weighting_class, "nowhere:composed")


def test_a_composed_aggregator_has_the_state_of_its_weighting() -> None:
    aggregator, other = composed(Averaging)(), composed(Averaging)()
    aggregator(torch.eye(2))
    assert isinstance(aggregator, Stateful)

    other.load_state_dict(aggregator.state_dict())
    assert other.weighting.calls == 1
    other.reset()
    assert other.weighting.calls == 0
    with pytest.raises(ParameterError):
        other.load_state_dict({})


def test_a_composed_aggregator_of_a_stateless_weighting_has_none() -> None:
    aggregator = composed(Stateless)()

    assert not isinstance(aggregator, Stateful)
    assert not any(hasattr(aggregator, name) for name in ("reset", "state_dict"))


class Third:
    """Satisfies the protocol without a class of ours, and changes its state in place."""

    def __init__(self) -> None:
        self.reset()

    def __call__(self, gramian: Tensor) -> Tensor:
        self.total += gramian.diagonal()
        return self.total.clone()

    def reset(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"].clone()


@define(eq=False)
class Around(NestedState):
    """Holds another method, and counts."""

    inner: Averaging = field(factory=Averaging)
    calls: int = state_field(int)

    def inner_parts(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def __call__(self, gramian: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(gramian)


STATEFUL = {
    "own": Averaging,
    "nested": Around,
    "third party": Third,
    "composed": compose("Averaging", Averaging, "tests:averaging"),
    "aggregator": lambda: GramianAggregator(Averaging()),
    "module": lambda: as_module(Averaging()),
}


def _interrupted(method: Any, gramian: Tensor) -> None:
    with state_kept(method):
        method(gramian)
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_steps_that_fail_after_the_weighing_leave_the_state(make: Callable[[], Any]) -> None:
    method, other = make(), make()
    gramian = torch.tensor([[1.0, 1.0], [1.0, 10.0]], dtype=torch.float64)
    for each in (method, other):
        each(gramian)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(method, gramian)
    assert torch.equal(method(2 * gramian), other(2 * gramian))


@define(eq=False)
class Following(NestedState, HistoryAggregator):
    """Weighs by what it holds, whose state moves on before its own."""

    inner: Averaging = field(factory=Averaging)

    def inner_parts(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        return rows

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        return self.inner(rows.gramian()), {}


AGGREGATORS: dict[str, Callable[[], Any]] = {
    "aggregator": lambda: GramianAggregator(Averaging()),
    "composed": compose("Averaging", Averaging, "tests:averaging"),
    "module": lambda: GramianAggregator(as_module(Averaging())),
    "history": Following,
}


@pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS)
def test_a_sum_of_rows_that_fails_leaves_the_state(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    method, other, matrix = make(), make(), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    for each in (method, other):
        each(matrix)
    with monkeypatch.context() as patch:
        patch.setattr(Columns, "combine", fail)
        with pytest.raises(MemoryError):
            method(5 * matrix)

    assert torch.equal(method(2 * matrix), other(2 * matrix))


class Stops(torch.autograd.Function):
    """Makes some backward passes."""

    left = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Stops.left -= 1
        if Stops.left < 0:
            raise MemoryError
        return grads[0]


def test_a_second_pass_that_fails_leaves_the_state_of_the_weighting() -> None:
    weighting = Averaging()
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    failed = 0
    for Stops.left in range(8):
        try:
            autogram.backward(Stops.apply(w**2), weighting, batch_dim=None, second_pass=True)
        except MemoryError:
            failed += 1
            assert weighting.calls == 0
            assert w.grad is None
        else:
            break
    assert failed > 1
    assert weighting.calls == 1


def test_an_observer_that_fails_leaves_the_state() -> None:
    def refuse(step: object) -> None:
        raise ValueError("no")

    weighting = Averaging()
    aggregator = GramianAggregator(weighting)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    backward(w**2)
    with monitor.record(refuse):
        with pytest.raises(ValueError, match="no"):
            weighting(torch.eye(2))
        with pytest.raises(ValueError, match="no"):
            jac_to_grad(w, aggregator)
    assert weighting.calls == 0
    jac_to_grad(w, aggregator)
    assert weighting.calls == 1
