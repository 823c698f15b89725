from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from jdcore import ParameterError, UnsolvedWarning, get_aggregator, get_weighting
from jdplugins.standard._linear_program import maximize_on_simplex


def test_the_loss_that_is_too_large_falls_alone() -> None:
    # Preferences 1 and 2 want the second loss at half of the first.
    weighting = get_weighting("epo", preference=torch.tensor([1.0, 2.0]))
    gramian = torch.eye(2)

    assert weighting(gramian, losses=torch.tensor([1.0, 2.0])).tolist() == [0.0, 1.0]
    assert weighting(gramian, losses=torch.tensor([9.0, 1.0])).tolist() == [1.0, 0.0]


def test_the_largest_loss_may_not_rise() -> None:
    # Lowering the third loss most would raise the first, which is the largest as well. With
    # a = (A, b, A): the best weights on rows 1 and 3 keep (G w)_1 >= 0.
    gramian = torch.tensor([[1.0, 0.0, -0.8], [0.0, 1.0, 0.0], [-0.8, 0.0, 4.0]])

    weights = get_weighting("epo")(gramian, losses=torch.tensor([5.0, 0.1, 5.0]))

    assert float((gramian @ weights)[0]) >= -1e-6
    assert weights.sum() == pytest.approx(1.0)


def test_at_the_preferred_ratio_all_losses_fall() -> None:
    # The sum of the entries of G w is largest at the longest row, but that conflicts: the border is
    # where (G w)_2 = -2 w_1 + w_2 = 0.
    gramian = torch.tensor([[8.0, -2.0], [-2.0, 1.0]])

    weights = get_weighting("epo")(gramian, losses=torch.tensor([3.0, 3.0]))

    torch.testing.assert_close(weights, torch.tensor([1 / 3, 2 / 3]))


def test_two_quadratics_reach_the_preferred_point_of_their_front() -> None:
    # L_1 = |x - a|² + .1 and L_2 = |x + a|² + .1; the front is the segment, and the preference asks
    # for L_1 = 3 L_2.
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.tensor([0.3, 0.9], dtype=torch.float64)
    aggregator = get_aggregator("epo", preference=torch.tensor([1.0, 3.0]), eps=1e-6)

    for _ in range(3000):
        losses = torch.stack([(x - a).square().sum(), (x + a).square().sum()]) + 0.1
        x = x - 0.005 * aggregator(torch.stack([2 * (x - a), 2 * (x + a)]), losses=losses)

    assert float(losses[0] / losses[1]) == pytest.approx(3.0, rel=0.02)
    assert float(x[1].abs()) < 0.02


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_the_rows_plays_no_part(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    losses = torch.tensor([1.0, 2.0, 3.0, 0.5])

    weights = get_weighting("epo")(matrix @ matrix.T * scale**2, losses=losses)

    expected = get_weighting("epo")(matrix @ matrix.T, losses=losses)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("preference", "losses", "message"),
    [
        ([1.0, 0.0], [1.0, 1.0], "`preference` must be positive"),
        ([1.0, 1.0], [1.0, 0.0], "`losses` must be positive"),
        ([1.0, 1.0], [-1.0, 1.0], "`losses` must be positive"),
    ],
)
def test_what_has_no_logarithm_is_refused(
    preference: list[float], losses: list[float], message: str
) -> None:
    weighting = get_weighting("epo", preference=torch.tensor(preference))

    with pytest.raises(ParameterError, match=message):
        weighting(torch.eye(2), losses=torch.tensor(losses))


def test_the_shortest_vector_satisfies_every_condition_so_all_problems_are_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        for m in (1, 2, 3, 7, 12):
            for n in (1, 3, 30):
                matrix = torch.randn(m, n, generator=generator, dtype=torch.float64)
                losses = torch.rand(m, generator=generator) + 0.01
                weights = get_weighting("epo")(matrix @ matrix.T, losses=losses)
                assert weights.min() >= 0.0
                assert weights.sum() == pytest.approx(1.0)


def test_conditions_that_nothing_satisfies_are_told() -> None:
    with pytest.warns(UnsolvedWarning, match="linear_program"):
        weights = maximize_on_simplex(np.ones(2), np.array([[1.0, 0.0]]), np.array([3.0]))

    assert weights.tolist() == [1.0, 0.0]


def test_preferences_whose_products_leave_the_range_are_balanced() -> None:
    preference = torch.tensor([1e-200, 1.0], dtype=torch.float64)
    losses = torch.tensor([1e-200, 1.0], dtype=torch.float64)
    weighting = get_weighting("epo", preference=preference)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = weighting(torch.eye(2, dtype=torch.float64), losses=losses)

    assert weights.tolist() == [0.0, 1.0]
