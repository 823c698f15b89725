from __future__ import annotations

import numpy as np
import pytest
import torch

from jdcore import ParameterError, get_aggregator, get_weighting
from jdcore.aggregation import GramianAggregator
from jdplugins.standard._simplex import descend, project_onto_simplex


def draw(m: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 30, generator=generator, dtype=torch.float64)


def test_one_step_by_hand() -> None:
    # λ - γ (A + ρ I) λ = (1/2, 1/2) - 0.1 ((2 + 1/2, 0 + 1/2) + 0.1 (1/2, 1/2)) = (.245, .445),
    # and both entries of the projection are that plus (1 - .69) / 2.
    cross = torch.tensor([[4.0, 1.0], [0.0, 1.0]], dtype=torch.float64)

    weights = get_weighting("modo", gamma=0.1, rho=0.1)(cross)

    expected = torch.tensor([0.245, 0.445], dtype=torch.float64) + (1.0 - 0.69) / 2.0
    torch.testing.assert_close(weights, expected)


def test_the_second_step_starts_from_the_weights_of_the_first() -> None:
    weighting = get_weighting("modo", gamma=0.1, rho=0.0)
    cross = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))

    # (1/2 - .05, 1/2 - .1) + .075, then (.525 - .0525, .475 - .095) + .07375.
    weighting(cross)
    weights = weighting(cross)

    torch.testing.assert_close(weights, torch.tensor([0.54625, 0.45375], dtype=torch.float64))


def test_many_steps_find_the_shortest_combination() -> None:
    matrix = draw(3, 0)
    weighting = get_weighting("modo", gamma=0.005, rho=0.0)

    for _ in range(3000):
        weights = weighting(matrix @ matrix.T)

    torch.testing.assert_close(weights, get_weighting("mgda")(matrix @ matrix.T), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e160, 1e200, 1e300])
def test_a_step_far_beyond_the_simplex_ends_in_its_corner(scale: float) -> None:
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64) * scale

    _, weights = get_aggregator("modo").aggregate_blocks([matrix], second=[matrix])

    assert weights.tolist() == [0.0, 1.0]


def test_another_number_of_objectives_is_refused_until_a_reset() -> None:
    weighting = get_weighting("modo")
    weighting(torch.eye(2))

    with pytest.raises(ParameterError, match=r"of 2 objectives.*one of 3\. Call reset\(\)"):
        weighting(torch.eye(3))
    weighting.reset()
    assert weighting(torch.eye(3)).shape == (3,)


def test_weights_of_another_library() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    ours = get_weighting("modo", gamma=0.02, rho=0.3)
    theirs = torchjd.MoDoWeighting(gamma=0.02, rho=0.3)

    for seed in range(20):
        cross = draw(4, seed) @ draw(4, seed + 100).T
        torch.testing.assert_close(ours(cross), theirs(cross))


@pytest.mark.parametrize("m", [1, 2, 3, 10])
def test_the_projection_satisfies_the_conditions_of_the_nearest_point(m: int) -> None:
    rng = np.random.default_rng(m)
    for scale in (1e-3, 1.0, 1e3):
        vector = scale * rng.standard_normal(m)
        weights = project_onto_simplex(vector)
        gap = vector - weights

        assert weights.min() >= 0.0
        assert weights.sum() == pytest.approx(1.0)
        assert (gap[weights > 0].max() - gap[weights > 0].min()) <= 1e-12 * scale
        assert gap.max() <= gap[weights > 0].max() + 1e-12 * scale


def test_entries_of_minus_infinity_have_no_weight() -> None:
    vector = descend(np.full(3, 1 / 3), np.array([0.0, 1e200, 0.0]), 1e200)

    assert project_onto_simplex(vector).tolist() == [0.5, 0.0, 0.5]


def test_rows_that_cancel_are_combined_in_float64() -> None:
    rows = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)).double()
    rows[7] = 1e-4 * rows[7] - rows[:7].sum(0)
    rows = rows.float()
    inner = get_weighting("modo", gamma=0.0)
    for aggregator in (GramianAggregator(inner), get_aggregator("row_momentum", weighting=inner)):
        expected = rows.double().mean(0)
        update = aggregator(rows, second=rows).double()
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-9)
