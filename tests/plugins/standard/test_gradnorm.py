from __future__ import annotations

from typing import Any

import pytest
import torch

from jdcore import ParameterError, get_weighting

NORMS = torch.tensor([4.0, 1.0], dtype=torch.float64)
GRAMIAN = torch.diag(NORMS**2)


def test_the_minimum_by_hand() -> None:
    # Losses fall to 1/2 and 1/4 of the first: rates 4/3 and 2/3, raised to α = 2.
    weighting = get_weighting("gradnorm", alpha=2.0, lr=None)
    weighting(GRAMIAN, losses=torch.tensor([2.0, 4.0]))

    weights = weighting(GRAMIAN, losses=torch.tensor([1.0, 1.0]))

    lengths = weights * NORMS
    assert weights.sum() == pytest.approx(2.0)
    assert lengths[0] / lengths[1] == pytest.approx(4.0)


def test_a_step_by_hand() -> None:
    # The mean length is 5/2: steps of lr * 8/5 down and lr * 2/5 up, then scaled to the sum 2.
    weights = get_weighting("gradnorm", lr=0.1)(GRAMIAN, losses=torch.ones(2))

    expected = torch.tensor([0.84, 1.04], dtype=torch.float64) * 2 / 1.88
    torch.testing.assert_close(weights, expected)


def test_steps_end_at_the_minimum_and_never_below_zero() -> None:
    losses = torch.tensor([1.0, 3.0])
    for lr in (0.01, 0.3, 50.0):
        weighting = get_weighting("gradnorm", lr=lr)
        for _ in range(300):
            weights = weighting(GRAMIAN, losses=losses)
            assert bool((weights > 0).all())
        torch.testing.assert_close(weights, torch.tensor([0.4, 1.6]).double(), rtol=0.02, atol=0)


def test_slower_objectives_get_longer_gradients() -> None:
    weighting = get_weighting("gradnorm", lr=None)
    gramian = torch.eye(2, dtype=torch.float64)
    weighting(gramian, losses=torch.tensor([10.0, 10.0]))

    weights = weighting(gramian, losses=torch.tensor([9.0, 1.0]))

    assert weights[0] > 1.9


def test_a_zero_row_keeps_its_weight_until_the_sum_is_restored() -> None:
    gramian = torch.diag(torch.tensor([0.0, 4.0, 4.0], dtype=torch.float64))

    weights = get_weighting("gradnorm", lr=None)(gramian, losses=torch.ones(3))

    # The mean length 4/3 wants 2/3 of each of the two others.
    expected = torch.tensor([1.0, 2 / 3, 2 / 3], dtype=torch.float64) * 3 / (1 + 4 / 3)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_losses_without_a_rate_are_refused_and_change_nothing(value: float) -> None:
    weighting = get_weighting("gradnorm")
    weighting(GRAMIAN, losses=torch.ones(2))
    before = repr(weighting.state_dict())

    with pytest.raises(ParameterError, match="`losses` must be positive: their ratios are rates"):
        weighting(GRAMIAN, losses=torch.tensor([1.0, value]))
    assert repr(weighting.state_dict()) == before


def test_a_rate_may_be_absent_but_not_negative() -> None:
    with pytest.raises(ParameterError, match="`lr` must be >= 0"):
        get_weighting("gradnorm", lr=-1.0)


def test_ratios_of_losses_may_leave_the_range() -> None:
    weighting = get_weighting("gradnorm", lr=None, alpha=1.0)
    for losses in ([1e-300, 1e-300], [2e300, 1e300]):
        weights = weighting(torch.eye(2).double(), losses=torch.tensor(losses, dtype=torch.float64))

    torch.testing.assert_close(weights, torch.tensor([4 / 3, 2 / 3]).double())


def test_a_state_that_no_call_leaves_is_refused() -> None:
    weighting: Any = get_weighting("gradnorm")
    ones = torch.ones(2)

    with pytest.raises(ParameterError, match="`first_losses` must be positive"):
        weighting.load_state_dict({"weights": ones, "first_losses": 0 * ones})
    with pytest.raises(ParameterError, match="`weights` must be free of negative numbers"):
        weighting.load_state_dict({"weights": -ones, "first_losses": ones})
    assert not weighting.state_dict()["weights"].numel()


@pytest.mark.parametrize("lr", [None, 0.5])
def test_powers_of_rates_beyond_all_numbers_leave_finite_weights(lr: float | None) -> None:
    weighting = get_weighting("gradnorm", alpha=1e4, lr=lr)
    gramian = torch.eye(2, dtype=torch.float64)
    weighting(gramian, losses=torch.tensor([1.0, 1.0]))

    weights = weighting(gramian, losses=torch.tensor([10.0, 0.1]))

    # The first is the slower one by far.
    expected = [2.0, 0.0] if lr is None else [1.5, 0.5]
    assert weights.tolist() == pytest.approx(expected)
    assert weighting.weights.isfinite().all()
