from __future__ import annotations

import math

import pytest
import torch

from jdcore import ParameterError, get_aggregator, get_weighting
from jdcore.testing import family

ORTHOGONAL = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "length"), [("min", 1.0), ("median", 3.0), ("rmse", math.sqrt(26 / 3))]
)
def test_orthogonal_rows_all_get_the_common_length(mode: str, length: float) -> None:
    # Singular values 4, 1, 3: minimum 1, median 3, and mean of the squares (16 + 1 + 9) / 3.
    vector = get_aggregator("aligned_mtl", scale_mode=mode)(ORTHOGONAL)

    torch.testing.assert_close(vector, torch.full((3,), length / 3).double())


def test_two_rows_solved_by_hand() -> None:
    # G = [[18, -22], [-22, 38]] has trace 56 and determinant 200, so its smaller eigenvalue is
    # 28 - √584, and G^(-1/2) = (adj G + √200 I) / (√200 √(56 + 2 √200)).
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    root = math.sqrt(200)
    factor = math.sqrt(28 - math.sqrt(584)) / (root * math.sqrt(56 + 2 * root))
    expected = factor * torch.tensor([30 + root / 2, 20 + root / 2], dtype=torch.float64)

    weights = get_weighting("aligned_mtl")(matrix @ matrix.T)

    torch.testing.assert_close(weights, expected)


def test_of_an_even_number_of_eigenvalues_the_lower_median_is_taken() -> None:
    vector = get_aggregator("aligned_mtl", scale_mode="median")(ORTHOGONAL[:2])

    torch.testing.assert_close(vector, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))


def test_preferences_select_and_weigh_the_aligned_rows() -> None:
    preferences = torch.tensor([1.0, 0.0, 2.0])

    vector = get_aggregator("aligned_mtl", pref_vector=preferences)(ORTHOGONAL)

    torch.testing.assert_close(vector, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))


def test_the_aligned_matrix_has_equal_singular_values() -> None:
    matrix = family("conflict", 4, 30, generator=torch.Generator().manual_seed(0))
    rows = [
        get_aggregator("aligned_mtl", pref_vector=unit)(matrix) for unit in torch.eye(4).unbind()
    ]

    singular = torch.linalg.svdvals(torch.stack(rows))

    torch.testing.assert_close(
        singular, torch.linalg.svdvals(matrix)[-1].expand(4), rtol=1e-9, atol=0
    )


def test_eigenvalues_that_are_rounding_do_not_set_the_scale() -> None:
    # The second row is the first up to float32 rounding: only one component is there to be kept.
    first = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    matrix = torch.cat([first, (first.double() / 3).float()])

    vector = get_aggregator("aligned_mtl")(matrix)

    assert float(vector.norm() / first.norm()) > 0.3


def test_an_unknown_scale_mode_is_refused_and_the_old_one_kept() -> None:
    weighting = get_weighting("aligned_mtl", scale_mode="rmse")

    with pytest.raises(ParameterError, match="one of 'min', 'median', 'rmse', got 'max'"):
        get_weighting("aligned_mtl", scale_mode="max")
    with pytest.raises(ParameterError, match="`scale_mode`"):
        weighting.scale_mode = "max"
    assert weighting.scale_mode == "rmse"
