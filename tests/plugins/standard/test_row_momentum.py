from __future__ import annotations

from typing import Any

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from jdcore.aggregation import Flattening, GramianAggregator, as_weighting
from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward
from jdcore.errors import NonFiniteError


def test_the_method_sees_averages_by_hand() -> None:
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("mgda"), beta=0.75)
    aggregator(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))

    # Y = ((3 + 2, 0), (0, 3 + 2)), whose shortest combination is half of each.
    vector = aggregator(torch.tensor([[8.0, 0.0], [0.0, 8.0]]))

    torch.testing.assert_close(vector, torch.tensor([2.5, 2.5]))


def test_without_momentum_it_is_the_method_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("upgrad"), beta=0.0)

    for _ in range(3):
        matrix = torch.randn(3, 10, generator=generator)
        assert torch.equal(aggregator(matrix), get_aggregator("upgrad")(matrix))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_of_a_function_do_not_depend_on_the_scale(scale: float) -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    aggregator = get_aggregator("row_momentum", weighting=lambda gramian: gramian.new_ones(2))

    torch.testing.assert_close(aggregator(matrix * scale) / scale, matrix.sum(0))


def test_noise_that_makes_rows_conflict_is_averaged_out() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[1.0, 0.2], [1.0, -0.2]], dtype=torch.float64)
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("mgda"), beta=0.99)

    for _ in range(2000):
        vector = aggregator(truth + 3 * torch.randn(2, 2, generator=generator).double())

    torch.testing.assert_close(
        vector, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=0.5
    )


def test_the_state_is_that_of_both_and_can_be_restored() -> None:
    def make() -> object:
        return get_aggregator(
            "row_momentum", weighting=get_weighting("periodic", weighting=get_weighting("mgda"))
        )

    one, two = make(), make()
    matrix = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    one(matrix)  # type: ignore[operator]
    two.load_state_dict(one.state_dict())  # type: ignore[attr-defined]

    assert set(one.state_dict()) == {"history", "weighting"}  # type: ignore[attr-defined]
    assert torch.equal(one(-matrix), two(-matrix))  # type: ignore[operator]
    one.reset()  # type: ignore[attr-defined]
    assert one.state_dict()["weighting"]["calls"] == 0  # type: ignore[attr-defined]


def test_losses_reach_the_wrapped_method() -> None:
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("gradnorm"))

    assert aggregator(torch.eye(2), losses=torch.ones(2)).tolist() == [1.0, 1.0]
    aggregator.reset()
    with pytest.raises(ParameterError, match="`losses` must be given"):
        aggregator(torch.eye(2))
    assert not len(aggregator.history)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_that_depend_on_the_scale_are_right_out_of_range(scale: float) -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    nash = get_weighting("nash_mtl", max_norm=0.0)

    vector = get_aggregator("row_momentum", weighting=nash)(matrix * scale)

    torch.testing.assert_close(vector, get_aggregator("nash_mtl", max_norm=0.0)(matrix))


def _step_of_an_engine(aggregator: Any) -> None:
    model = torch.nn.Linear(3, 2)
    Engine(model, batch_dim=None).backward(model(torch.ones(3)), aggregator)


@pytest.mark.parametrize(
    "take",
    [
        as_weighting,
        GramianAggregator,
        Flattening,
        lambda aggregator: get_weighting("cr_mogm", weighting=aggregator),
        lambda aggregator: get_aggregator("row_momentum", weighting=aggregator),
        lambda aggregator: gramian_backward(torch.ones(2, requires_grad=True) * 2, aggregator),
        _step_of_an_engine,
    ],
)
def test_what_takes_a_weighting_does_not_take_the_one_it_wraps(take: Any) -> None:
    # The rows would be weighed as they are, without their past.
    with pytest.raises(ParameterTypeError, match="`weighting` must be a Weighting"):
        take(get_aggregator("row_momentum", weighting=get_weighting("upgrad")))


def test_the_past_of_the_rows_is_kept_inside_of_other_aggregators() -> None:
    inner, alone = (get_aggregator("row_momentum", weighting=get_weighting("upgrad")) for _ in "12")
    wrapped = get_aggregator("present_tasks", aggregator=inner)
    generator = torch.Generator().manual_seed(0)

    assert wrapped.weighting is None
    for _ in range(3):
        matrix = torch.randn(3, 5, generator=generator)
        torch.testing.assert_close(wrapped(matrix), alone(matrix))


def test_averages_that_cancel_are_combined_in_float64() -> None:
    rows = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)).double()
    rows[7] = 1e-4 * rows[7] - rows[:7].sum(0)
    rows = rows.float()
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("mgda"), beta=0.0)

    expected = get_aggregator("mgda")(rows.double())

    torch.testing.assert_close(aggregator(rows).double(), expected, rtol=1e-5, atol=1e-9)


def test_weights_beyond_float64_make_an_update_that_is_not() -> None:
    rows = torch.tensor([[3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64) * 1e-300
    fair = get_weighting("fairgrad", alpha=2.0)
    aggregator = get_aggregator("row_momentum", weighting=fair, beta=0.0)

    torch.testing.assert_close(aggregator(rows), GramianAggregator(fair)(rows))


def test_a_method_of_two_batches_sees_the_averages_beside_the_second() -> None:
    # The weights (1/2, 1/2) less 0.4 (Y J₂ᵀ) of them, and back to the sum 1: (0.4, 0.6) for
    # Y = diag(2, 1), and (0.24, 0.12) + 0.32 for Y = diag(1, 2).
    second = torch.eye(2)
    weighting = get_weighting("modo", gamma=0.4, rho=0.0)
    aggregator = get_aggregator("row_momentum", weighting=weighting, beta=0.5)

    whole = aggregator(torch.diag(torch.tensor([2.0, 1.0])), second=second)
    matrix = torch.diag(torch.tensor([0.0, 3.0]))
    vectors, _ = aggregator.aggregate_blocks(matrix.split(1, 1), second=second.split(1, 1))

    torch.testing.assert_close(whole, torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(torch.cat(vectors), torch.tensor([0.56, 0.88]))


def test_a_second_batch_that_is_missing_or_does_not_fit_leaves_the_state_as_it_was() -> None:
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("sdmgrad"))
    for second in (None, torch.eye(3)):
        with pytest.raises(ParameterError, match="`second` must be"):
            aggregator(torch.eye(2), second=second)
    assert not len(aggregator.history)


def test_a_second_batch_that_is_not_finite_is_told_like_the_first_one() -> None:
    second = torch.tensor([[1.0, 0.0], [0.0, torch.nan]])
    aggregator = get_aggregator("row_momentum", weighting=get_weighting("sdmgrad"))

    assert aggregator(torch.eye(2), second=second).isnan().all()
    aggregator.check_finite = True
    with pytest.raises(NonFiniteError, match=r"objectives \[1\]"):
        aggregator(torch.eye(2), second=second)
    assert not len(aggregator.history)
