from __future__ import annotations

import math

import pytest
import torch

from jdcore import JDCoreWarning, get_aggregator, get_weighting
from jdcore.testing import family


def test_orthogonal_rows_get_weights_inverse_to_their_lengths() -> None:
    matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]])

    torch.testing.assert_close(get_aggregator("imtl_g")(matrix), torch.tensor([0.75, 0.75]))


def test_two_rows_solved_by_hand() -> None:
    # x = w g0 + (1 - w) g1 = (6 - 10 w, 1, 1), |g0|² = 18, |g1|² = 38, and
    # g0·x / √18 = (40 w - 22) / √18 = g1·x / √38 = (38 - 60 w) / √38.
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    a, b = math.sqrt(18), math.sqrt(38)
    weight = (38 * a + 22 * b) / (40 * b + 60 * a)

    weights = get_weighting("imtl_g")(matrix @ matrix.T)

    torch.testing.assert_close(weights, torch.tensor([weight, 1 - weight], dtype=torch.float64))


@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
@pytest.mark.parametrize("m", [2, 5, 16])
def test_the_projections_on_all_rows_are_equal_and_weights_sum_to_one(name: str, m: int) -> None:
    matrix = family(name, m, 100, generator=torch.Generator().manual_seed(m))
    weights = get_weighting("imtl_g")(matrix @ matrix.T)
    projections = matrix @ (weights @ matrix) / matrix.norm(dim=1)

    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(projections, projections[0].expand(m), rtol=1e-8, atol=0.0)


def test_a_duplicate_row_shares_the_weight_of_its_twin() -> None:
    # The common projection is that on (1, 0) and (0, 1): x is a multiple of (1, 1).
    matrix = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    weights = get_weighting("imtl_g")(matrix @ matrix.T)

    torch.testing.assert_close(weights, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))


def test_opposite_rows_have_only_the_projection_zero_in_common() -> None:
    matrix = torch.tensor([[1.0, 2.0], [-3.0, -6.0]])

    assert get_aggregator("imtl_g")(matrix).tolist() == [0.0, 0.0]


def test_weights_that_cannot_sum_to_one_are_zero_with_a_warning() -> None:
    # With cosines 0.9, 0.9, 0.7 the solution of C z = 1 is (-1.25, 1.25, 1.25): divided by the
    # norms 1, 2, 2 it sums to zero.
    norms = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    cosines = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.7], [0.9, 0.7, 1.0]], dtype=torch.float64)

    with pytest.warns(JDCoreWarning, match="no solution whose weights sum to 1"):
        weights = get_weighting("imtl_g")(norms[:, None] * cosines * norms)

    assert weights.tolist() == [0.0, 0.0, 0.0]
