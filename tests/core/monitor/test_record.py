from __future__ import annotations

import io
import json
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore import autogram, monitor
from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    GramianWeighting,
    report_residual,
)
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad
from jdcore.errors import ParameterError, ParameterTypeError
from tests.core.methods import EqualWeighting, HalvesWeighting, Largest
from tests.operations import Operations

# Gradients [1, 0] and [-3, 4]: lengths 1 and 5, cosine -0.6.
MATRIX = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])


def recorded(aggregator: object, matrix: Tensor = MATRIX, **options: object) -> monitor.Step:
    with monitor.record(**options) as history:  # type: ignore[arg-type]
        aggregator(matrix)  # type: ignore[operator]
    [step] = history
    return step


def test_a_step_holds_what_two_gradients_show() -> None:
    step = recorded(GramianAggregator(HalvesWeighting()))

    assert step.method == "Halves"
    assert step.weights == [0.5, 0.5]
    assert step.norms == [1.0, 5.0]
    assert step.products == [-1.0, 11.0]  # of the update [-1, 2]
    assert step.conflicts == 0.5
    assert step.conflicting_pairs == 1.0
    assert step.alignment == pytest.approx(-0.6)
    assert step.cosines is not None
    assert step.cosines[0] == pytest.approx([1.0, -0.6])
    assert step.seconds >= 0.0
    assert step.change is None


@define(eq=False)
class SolvedWeighting(HalvesWeighting):
    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        for residual in (1e-12, 3e-11):
            report_residual(lambda residual=residual: residual)
        return super().compute(gramian)


def test_a_step_tells_how_well_the_worst_of_its_problems_was_solved() -> None:
    step = recorded(GramianAggregator(SolvedWeighting()))

    assert step.residual == 3e-11
    assert monitor.scalars(step)["jd/residual"] == 3e-11
    assert recorded(GramianAggregator(HalvesWeighting())).residual is None


def test_the_mean_is_recorded_without_a_gramian_unless_asked() -> None:
    plain = recorded(GramianAggregator(EqualWeighting()))
    full = recorded(GramianAggregator(EqualWeighting()), complete=True)

    assert (plain.weights, plain.norms, plain.conflicts) == ([0.5, 0.5], None, None)
    assert (full.norms, full.products) == ([1.0, 5.0], [-1.0, 11.0])


def test_a_method_without_weights_has_products() -> None:
    step = recorded(Largest(), complete=True)

    assert step.weights is None
    assert step.products == [1.0, 13.0]  # of the update [1, 4]


def test_cosines_of_many_objectives_are_not_kept() -> None:
    assert recorded(GramianAggregator(HalvesWeighting()), cosines_up_to=1).cosines is None


@pytest.mark.parametrize("second", [[-1.0 - 1e-7, 1.0], [-1.0, 0.0]])
def test_an_update_that_is_zero_or_orthogonal_up_to_rounding_does_not_conflict(
    second: list[float],
) -> None:
    matrix = torch.tensor([[1.0, 0.0], second])

    assert recorded(GramianAggregator(HalvesWeighting()), matrix).conflicts == 0.0


@pytest.mark.parametrize("call", ["jac_to_grad", "gramian_backward", "engine"])
def test_every_call_that_makes_an_update_is_heard_once(call: str) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    losses = model(MATRIX).squeeze(1)
    with monitor.record() as history:
        if call == "jac_to_grad":
            backward(losses)
            jac_to_grad(model.parameters(), GramianAggregator(HalvesWeighting()))
        elif call == "gramian_backward":
            gramian_backward(losses, HalvesWeighting())
        else:
            engine = Engine(model, batch_dim=0)
            engine.backward(model(MATRIX).squeeze(1), HalvesWeighting())

    [step] = history
    assert step.products == pytest.approx([-1.0, 11.0])


def test_a_flattened_weighting_bears_its_own_name() -> None:
    with monitor.record() as history:
        Flattening(HalvesWeighting())(torch.ones(1, 2, 2, 1))

    assert [step.method for step in history] == ["Halves"]


def test_a_step_that_nobody_reads_costs_no_operation() -> None:
    aggregator = GramianAggregator(HalvesWeighting())
    with Operations() as plain:
        aggregator(MATRIX)
    with monitor.record() as history, Operations() as recorded:
        aggregator(MATRIX)

    assert recorded.counts.total() == plain.counts.total()
    assert history[0].products == [-1.0, 11.0]


def test_weights_that_are_overwritten_later_are_recorded_as_they_were() -> None:
    weighting = HalvesWeighting()
    with monitor.record() as history:
        weighting(MATRIX @ MATRIX.T).zero_()

    assert history[0].weights == [0.5, 0.5]


def test_a_gramian_that_is_overwritten_later_is_recorded_as_it_was() -> None:
    gramian = (MATRIX @ MATRIX.T).double()
    with monitor.record() as history:
        HalvesWeighting()(gramian)
        gramian.fill_(1.0)
        HalvesWeighting()(gramian)

    assert [step.norms for step in history] == [[1.0, 5.0], [1.0, 1.0]]


@define(eq=False)
class ReusingWeighting(GramianWeighting):
    """Its solver answers in an array that it keeps, and measures the largest entry of it."""

    buffer: NDArray[np.float64]
    measured: int = 0

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        self.buffer += 1.0
        report_residual(self.measure, self.buffer)
        return self.buffer[: len(gramian)]

    def measure(self, answer: NDArray[np.float64]) -> float:
        self.measured += 1
        return float(answer.max())


@pytest.mark.parametrize("call", ["engine", "engine, two dimensions", "gramian_backward", "rows"])
def test_a_function_may_write_into_the_gramian_that_it_is_given(call: str) -> None:
    def normalizing(gramian: Tensor) -> Tensor:
        gramian /= 100.0
        gramian.requires_grad_()  # such as to take steps of its own
        return gramian.new_full(gramian.shape[: gramian.ndim // 2], 0.5)

    weights = torch.zeros(2, requires_grad=True)
    losses = MATRIX @ weights
    with monitor.record() as history:
        if call == "gramian_backward":
            gramian_backward(losses, normalizing)
        elif call == "rows":
            backward(losses)
            jac_to_grad(weights, GramianAggregator(normalizing))
        else:
            losses = losses[:, None] if "two" in call else losses
            autogram.backward(losses, normalizing, batch_dim=0)
    assert history[0].norms == [1.0, 5.0]
    assert weights.grad is not None
    assert weights.grad.tolist() == [-1.0, 2.0]


def test_a_residual_is_measured_when_it_is_read_of_the_answer_as_it_was() -> None:
    weighting = ReusingWeighting(np.zeros(2))
    with monitor.record() as history:
        for _ in range(3):
            GramianAggregator(weighting)(MATRIX)

    assert weighting.measured == 0
    assert [step.residual for step in history] == [1.0, 2.0, 3.0]


def test_a_residual_of_many_entries_is_measured_at_once() -> None:
    weighting = ReusingWeighting(np.zeros(1000))
    with monitor.record() as history:
        for _ in range(3):
            GramianAggregator(weighting)(MATRIX)

    assert weighting.measured == 3
    assert [step.residual for step in history] == [1.0, 2.0, 3.0]


def test_gramians_of_many_objectives_are_kept_up_to_a_limit() -> None:
    matrix = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    with monitor.record() as history:
        for i in range(8):  # of 320 kB
            GramianAggregator(HalvesWeighting())(matrix * 2.0**i)
            assert sum(step.held for step in history) <= 2**20

    first = history[0].norms
    assert first == pytest.approx(matrix.norm(dim=1).tolist())
    assert [step.norms for step in history] == [[x * 2.0**i for x in first] for i in range(8)]


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
@pytest.mark.parametrize("method", [GramianAggregator(HalvesWeighting()), Largest()])
def test_numbers_that_do_not_depend_on_the_scale_are_right_at_any_scale(
    method: object, scale: float
) -> None:
    """The squares of these entries are not in the range of float64."""
    plain = recorded(method, MATRIX.double(), complete=True)
    scaled = recorded(method, MATRIX.double() * scale, complete=True)

    assert scaled.norms == [scale * 1.0, scale * 5.0]
    assert (scaled.weights, scaled.conflicts) == (plain.weights, plain.conflicts)
    assert (scaled.cosines, scaled.alignment) == (plain.cosines, plain.alignment)
    assert scaled.products == [x * scale * scale for x in plain.products or ()]


@define(eq=False)
class InverseWeighting(GramianWeighting):
    scale_degree = -1

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / np.sqrt(gramian.diagonal())


def test_weights_that_depend_on_the_scale_are_those_of_the_rows() -> None:
    step = recorded(GramianAggregator(InverseWeighting()), MATRIX.double() * 2.0**900)

    assert step.weights == [2.0**-900, 0.2 * 2.0**-900]
    assert step.products == pytest.approx([0.4 * 2.0**900, 2.0 * 2.0**900])  # of (0.4, 0.8)


def test_every_so_manieth_weighing_is_recorded() -> None:
    with monitor.record(every=3) as history:
        for _ in range(7):
            GramianAggregator(HalvesWeighting())(MATRIX)

    assert [step.index for step in history] == [0, 3, 6]


def test_another_thread_is_not_recorded() -> None:
    aggregator = GramianAggregator(HalvesWeighting())
    with monitor.record() as history:
        thread = threading.Thread(target=aggregator, args=(MATRIX,))
        thread.start()
        thread.join()

    assert len(history) == 0


def test_non_finite_gradients_are_recorded_as_they_are() -> None:
    step = recorded(GramianAggregator(HalvesWeighting()), torch.tensor([[math.nan], [1.0]]))

    assert step.weights is not None
    assert all(map(math.isnan, step.weights))


def test_a_history_of_no_rows_is_recorded() -> None:
    step = recorded(GramianAggregator(HalvesWeighting()), torch.empty(0, 2))

    assert step.weights == []


def test_the_history_is_plain_data_by_quantity() -> None:
    with monitor.record() as history:
        for _ in range(2):
            GramianAggregator(HalvesWeighting())(MATRIX)

    table = history.to_dict()
    assert table["index"] == [0, 1]
    assert table["weights"] == [[0.5, 0.5], [0.5, 0.5]]
    assert json.loads(json.dumps(table)) == table
    assert repr(history).startswith("History of 2 steps, the last: conflicts 0.5, ")
    assert repr(monitor.History()) == "History of no steps"


def test_the_optimizers_own_step_is_recorded() -> None:
    """Momentum carries the step on along the first gradient, which raises the second loss."""
    w = torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=1.0)
    signs = [torch.tensor([1.0, 1.0]), torch.tensor([-0.5, -0.5])]
    # Of any shape; the record has them in one list.
    with monitor.record(optimizer=optimizer, losses=lambda: (sign * w)[None]) as history:
        for sign in signs:
            optimizer.zero_grad()
            gramian_backward(sign * w, HalvesWeighting())
            optimizer.step()

    first, second = history
    assert first.change == [-1.0, -1.0]
    assert first.raised == 0.0
    # The velocity is 1 - 0.5, so the second step is -0.5 again, and the losses are -0.5 w.
    assert second.change == [0.25, 0.25]
    assert second.raised == 1.0
    assert second.conflicts == 0.0
    assert w.item() == -1.5  # as it would be without the record


def test_the_step_of_an_optimizer_that_weighs_in_its_closure_is_recorded() -> None:
    """LBFGS asks its closure for gradients, several times in a step."""
    w = torch.tensor([3.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        gramian_backward(w**2, HalvesWeighting())
        return (w.detach() ** 2).sum()

    with monitor.record(optimizer=optimizer, losses=lambda: w**2) as history:
        optimizer.step(closure)
        moved = w.item() - 3.0
        assert moved != 0.0
        optimizer.step(closure)

    *earlier, last = [step.change for step in history if step.index < 2]
    assert earlier == [None]  # of the same step, by the weighing before
    assert last == pytest.approx([6.0 * moved])
    assert len(history) > 2


def test_an_optimizer_without_gradients_makes_no_step() -> None:
    w, other = torch.tensor([0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.SGD([other], lr=1.0)
    with monitor.record(optimizer=optimizer, losses=lambda: other * 1.0) as history:
        gramian_backward(w * 1.0, HalvesWeighting())
        optimizer.step()

    assert [step.change for step in history] == [None]


def test_a_step_that_no_optimizer_made_is_recorded_all_the_same() -> None:
    w = torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0)
    with monitor.record(optimizer=optimizer, losses=lambda: w * 1.0) as history:
        gramian_backward(w * 1.0, HalvesWeighting())

    assert [step.change for step in history] == [None]
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ParameterError, "`every` must be >= 1, got 0"),
        ({"every": True}, ParameterTypeError, "`every` must be an int, got True"),
        ({"cosines_up_to": -1}, ParameterError, "`cosines_up_to` must be >= 0, got -1"),
        ({"losses": lambda: None}, ParameterError, "Give both or neither"),
        ({"complete": "no"}, ParameterTypeError, "`complete` must be a bool"),
        ({"optimizer": "sgd", "losses": print}, ParameterTypeError, "`optimizer` must be a torch"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)]), "losses": torch.ones(2)},
            ParameterTypeError,
            "`losses` must be a function that evaluates the losses, got a float32 Tensor",
        ),
    ],
)
def test_unusable_options_are_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), monitor.record(**options):  # type: ignore[arg-type]
        pass


class FakeWriter:
    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.curves.setdefault(name, []).append((step, value))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.add_scalar(name, value, step)


@pytest.mark.parametrize("make", [monitor.TensorBoardWriter, monitor.LoggerWriter])
def test_writers_hand_on_single_numbers(make: type) -> None:
    target = FakeWriter()
    with monitor.record(make(target)):
        GramianAggregator(HalvesWeighting())(MATRIX)

    assert target.curves["jd/conflicting_pairs"] == [(0, 1.0)]
    assert target.curves["jd/norm/1"] == [(0, 5.0)]
    assert "jd/weight/0" in target.curves


def test_many_objectives_are_logged_by_their_extremes() -> None:
    step = recorded(GramianAggregator(HalvesWeighting()), torch.diag(torch.arange(1.0, 21.0)))

    numbers = monitor.scalars(step, prefix="")
    assert (numbers["norm/min"], numbers["norm/max"]) == (1.0, 20.0)
    assert not any(name.startswith("norm/1") for name in numbers)


def test_something_that_cannot_log_is_refused() -> None:
    with pytest.raises(ParameterTypeError, match="`logger` must be an object with log_metrics or"):
        monitor.LoggerWriter(3)
    with pytest.raises(ParameterTypeError, match="`writer` must be an object with add_scalar, got"):
        monitor.TensorBoardWriter(monitor.TensorBoardWriter)
    with pytest.raises(ParameterError, match="`every` must be >= 1"):
        monitor.ProgressLine(every=0)


@pytest.mark.parametrize("callback", [3, None, monitor.ProgressLine])
def test_what_cannot_hear_of_a_step_is_refused(callback: Any) -> None:
    with (
        pytest.raises(ParameterTypeError, match="`callbacks` must be functions of a Step"),
        monitor.record(callback),
    ):
        pass


@pytest.mark.parametrize("callbacks", [print, iter([print]), {print}, 3])
def test_callbacks_that_are_no_sequence_are_refused(callbacks: Any) -> None:
    with pytest.raises(ParameterTypeError, match=r"`callbacks` must be .* in a tuple, got"):
        monitor.History(callbacks)


def test_the_progress_line_says_how_the_objectives_get_along() -> None:
    stream = io.StringIO()
    with monitor.record(monitor.ProgressLine(stream, every=2)):
        for _ in range(3):
            GramianAggregator(HalvesWeighting())(MATRIX)

    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 0  Halves  pairs in conflict 100%  update 50%  alignment -0.60")
    assert second.startswith("step 2  ")
