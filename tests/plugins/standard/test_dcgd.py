from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, get_aggregator

CONFLICT = torch.tensor([[4.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def test_the_centre_by_hand() -> None:
    # Lengths 4 and √2; the line between them is e1 + (-1, 1) / √2.
    vector = get_aggregator("dcgd")(CONFLICT)

    half = (4.0 + math.sqrt(2.0)) / 2.0
    line = torch.tensor([1.0 - math.sqrt(0.5), math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(vector, half * line)
    # It is the projection of the sum onto that line.
    total = CONFLICT.sum(dim=0)
    torch.testing.assert_close(vector, (total @ line) / (line @ line) * line)


def test_the_projection_by_hand() -> None:
    # The sum (3, 1) conflicts with (-1, 1): what is orthogonal to that is (2, 2).
    vector = get_aggregator("dcgd", variant="projection")(CONFLICT)

    torch.testing.assert_close(vector, torch.tensor([2.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(vector, 2 * get_aggregator("dualproj")(CONFLICT))


def test_the_average_by_hand() -> None:
    # The parts of (3, 1) orthogonal to (4, 0) and to (-1, 1) are (0, 1) and (2, 2).
    vector = get_aggregator("dcgd", variant="average")(CONFLICT)

    torch.testing.assert_close(vector, torch.tensor([1.0, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("variant", ["projection", "average"])
def test_a_sum_without_conflict_is_left_alone(variant: str) -> None:
    matrix = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])

    assert torch.equal(get_aggregator("dcgd", variant=variant)(matrix), matrix.sum(dim=0))


@pytest.mark.parametrize("variant", ["center", "projection", "average"])
def test_no_variant_conflicts_with_either_group(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        matrix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        groups = torch.stack([matrix[:2].sum(dim=0), matrix[2:].sum(dim=0)])

        vector = get_aggregator("dcgd", variant=variant, n_residuals=2)(matrix)

        assert float((groups @ vector).min()) >= -1e-12


@pytest.mark.parametrize("variant", ["center", "projection", "average"])
@pytest.mark.parametrize(
    "matrix",
    [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(3, 2)],
)
def test_a_group_that_is_missing_or_zero_leaves_the_sum(variant: str, matrix: Tensor) -> None:
    assert torch.equal(get_aggregator("dcgd", variant=variant)(matrix), matrix.sum(dim=0))


def test_opposite_groups_stop_at_the_centre() -> None:
    matrix = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)

    assert get_aggregator("dcgd")(matrix).abs().max() <= 1e-15


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ParameterError, match="`variant` must be one of 'center'"):
        get_aggregator("dcgd", variant="middle")


@pytest.mark.parametrize("variant", ["center", "projection", "average"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_is_rounding_of_its_rows_counts_as_zero(
    variant: str, dtype: torch.dtype
) -> None:
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([rows[:2], -rows[:2].sum(0, keepdim=True), rows[2:]]).to(dtype)

    vector = get_aggregator("dcgd", variant=variant, n_residuals=3)(rows)

    torch.testing.assert_close(vector, rows.double().sum(0).to(dtype))
