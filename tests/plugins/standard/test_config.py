from __future__ import annotations

import pytest
import torch

from jdcore import get_aggregator, get_weighting
from jdcore.aggregation import ConFIG
from jdcore.testing import family


def test_orthogonal_rows_give_the_diagonal_with_the_length_of_all_projections() -> None:
    # Direction (1, 1) / √2, length (3 + 1) / √2.
    matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]])

    torch.testing.assert_close(get_aggregator("config")(matrix), torch.tensor([2.0, 2.0]))


def test_preferences_set_the_ratios_of_the_cosines() -> None:
    # Direction (2, 1) / √5, length (3 * 2 + 1) / √5.
    matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    for preferences in (torch.tensor([2.0, 1.0]), torch.tensor([200.0, 100.0])):
        vector = get_aggregator("config", pref_vector=preferences)(matrix)
        torch.testing.assert_close(vector, torch.tensor([2.8, 1.4], dtype=torch.float64))


@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
@pytest.mark.parametrize("m", [2, 5, 16])
def test_cosines_are_equal_and_the_length_is_the_sum_of_the_projections(name: str, m: int) -> None:
    matrix = family(name, m, 100, generator=torch.Generator().manual_seed(m))
    vector = get_aggregator("config")(matrix)
    cosines = matrix @ vector / (matrix.norm(dim=1) * vector.norm())

    assert float(cosines.min()) > 0
    torch.testing.assert_close(cosines, cosines[0].expand(m), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(
        vector.norm(), (matrix @ vector / vector.norm()).sum(), rtol=1e-9, atol=0.0
    )


def test_it_is_the_pseudo_inverse_of_the_matrix_of_directions() -> None:
    matrix = family("rankdef", 6, 10, generator=torch.Generator().manual_seed(3))
    directions = matrix / matrix.norm(dim=1, keepdim=True)
    best = torch.linalg.pinv(directions).sum(dim=1)
    unit = best / best.norm()

    vector = get_aggregator("config")(matrix)

    torch.testing.assert_close(vector, (matrix @ unit).sum() * unit, rtol=1e-9, atol=1e-9)


def test_opposite_rows_of_any_lengths_give_zero() -> None:
    matrix = torch.tensor([[1.0, 2.0], [-3.0, -6.0]])

    assert get_aggregator("config")(matrix).tolist() == [0.0, 0.0]


def test_zero_rows_get_weight_zero() -> None:
    matrix = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])

    weights = get_weighting("config")(matrix @ matrix.T)

    assert float(weights[0]) == 0.0
    torch.testing.assert_close(weights @ matrix, torch.tensor([2.0, 2.0]))


def test_whether_rows_are_dependent_does_not_depend_on_their_order() -> None:
    """Up to rounding, the last one is the sum of the others, which pivots show only where it is."""
    m = 200
    rows = torch.eye(m)
    rows[-1, :-1] = (m - 1) ** -0.5
    rows[-1, -1] = 1.2e-3
    last, first = (ConFIG()(r.half()).double() for r in (rows, rows.roll(1, 0)))
    assert float((last - first).norm()) <= 1e-3 * float(last.norm())


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_only_the_ratios_of_preferences_matter_at_any_scale(scale: float) -> None:
    preferences = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    matrix = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.3, 2.0]], dtype=torch.float64)

    vector = get_aggregator("config", pref_vector=preferences * scale)(matrix)

    torch.testing.assert_close(vector, get_aggregator("config", pref_vector=preferences)(matrix))


def test_a_preference_may_be_smaller_than_another_by_more_than_has_a_square() -> None:
    preferences = torch.tensor([1.0, 1e-200], dtype=torch.float64)

    vector = get_aggregator("config", pref_vector=preferences)(torch.diag(preferences + 3.0))

    torch.testing.assert_close(vector, torch.tensor([4.0, 3e-200], dtype=torch.float64))


def test_preferences_of_zero_ask_for_nothing() -> None:
    assert not get_aggregator("config", pref_vector=torch.zeros(2))(torch.eye(2)).any()
