from __future__ import annotations

import torch

from jdcore import get_aggregator, get_weighting


def test_the_sum_of_the_rows() -> None:
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

    assert get_aggregator("sum")(matrix).tolist() == [2.0, 2.0, 2.0]


def test_the_weights_are_ones() -> None:
    assert get_weighting("sum")(torch.eye(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_derivative_of_the_sum_is_one_everywhere() -> None:
    matrix = torch.randn(2, 3, requires_grad=True)

    get_aggregator("sum")(matrix).sum().backward()

    assert torch.equal(matrix.grad, torch.ones(2, 3))
