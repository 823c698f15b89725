from __future__ import annotations

import pytest
import torch

from jdcore.aggregation import Mean, MeanWeighting


def test_each_coordinate_is_averaged() -> None:
    # (-4 + 6) / 2 = 1 in the first coordinate, (1 + 1) / 2 = 1 in the others.
    update = Mean()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))

    assert torch.equal(update, torch.ones(3))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_all_weights_are_equal_whatever_the_gramian(m: int) -> None:
    weights = MeanWeighting()(torch.diag(torch.arange(1.0, m + 1)))

    assert torch.equal(weights, torch.full((m,), 1 / m))


def test_its_derivative_is_that_of_the_mean() -> None:
    matrix = torch.randn(4, 3, requires_grad=True)

    Mean()(matrix).sum().backward()

    assert torch.equal(matrix.grad, torch.full((4, 3), 0.25))
