from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import get_aggregator, get_weighting
from jdcore.testing import FAMILIES, family


def sequential(matrix: Tensor, seed: int) -> Tensor:
    """The method row by row, as in the paper, with the permutations of the given seed."""
    generator = torch.Generator().manual_seed(seed)
    m = len(matrix)
    total = torch.zeros_like(matrix[0])
    for i in range(m):
        row = matrix[i].clone()
        for j in torch.randperm(m, generator=generator).tolist():
            product = float(row @ matrix[j])
            if j != i and product < 0:
                row = row - product / float(matrix[j] @ matrix[j]) * matrix[j]
        total += row
    return total


def test_each_of_two_conflicting_rows_is_projected_off_the_other() -> None:
    # g0·g1 = -1, |g0|² = 1, |g1|² = 2: (g0 + g1/2) + (g1 + g0) = (0.5, 0.5) + (0, 1).
    matrix = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])

    torch.testing.assert_close(get_aggregator("pcgrad")(matrix), torch.tensor([0.5, 1.5]))


def test_the_weights_of_two_conflicting_rows() -> None:
    # G = [[18, -22], [-22, 38]]: row 0 gets 22/18 from row 1's projection, row 1 gets 22/38.
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)

    weights = get_weighting("pcgrad")(matrix @ matrix.T)

    torch.testing.assert_close(
        weights, torch.tensor([1 + 22 / 18, 1 + 22 / 38], dtype=torch.float64)
    )


def test_rows_without_conflict_are_added_up() -> None:
    matrix = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])

    assert get_aggregator("pcgrad")(matrix).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("special", "lowdim")])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 13])
def test_the_vectorised_steps_are_those_of_the_sequential_loop(name: str, m: int) -> None:
    for seed in range(3):
        matrix = family(name, m, 40, generator=torch.Generator().manual_seed(seed))
        aggregator = get_aggregator("pcgrad", generator=torch.Generator().manual_seed(seed))

        expected = sequential(matrix, seed)
        scale = float(matrix.abs().max())
        torch.testing.assert_close(
            aggregator(matrix) / scale, expected / scale, rtol=1e-9, atol=1e-12
        )


def test_the_order_matters_and_the_generator_decides_it() -> None:
    matrix = family("conflict", 5, 20, generator=torch.Generator().manual_seed(0))
    aggregators = [
        get_aggregator("pcgrad", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    first, same, other = (aggregator(matrix) for aggregator in aggregators)

    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, aggregators[0](matrix))


def test_zero_rows_neither_project_nor_are_projected() -> None:
    matrix = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0]])

    torch.testing.assert_close(get_aggregator("pcgrad")(matrix), torch.tensor([0.5, 1.5]))
