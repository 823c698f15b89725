from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting

MATRIX = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def test_the_weighted_sum_of_the_rows() -> None:
    aggregator = get_aggregator("constant", weights=torch.tensor([1.0, 2.0]))

    assert aggregator(MATRIX).tolist() == [8.0, 3.0, 3.0]


def test_negative_and_zero_weights_are_taken_as_they_are() -> None:
    aggregator = get_aggregator("constant", weights=torch.tensor([-0.5, 0.0]))

    assert aggregator(MATRIX).tolist() == [2.0, -0.5, -0.5]


def test_the_derivative_is_the_weights() -> None:
    matrix = MATRIX.clone().requires_grad_()

    get_aggregator("constant", weights=torch.tensor([1.0, 2.0]))(matrix).sum().backward()

    assert matrix.grad.tolist() == [[1.0] * 3, [2.0] * 3]


def test_weights_are_required_and_checked() -> None:
    with pytest.raises(TypeError, match="weights"):
        get_aggregator("constant")
    with pytest.raises(ParameterTypeError, match="Wrap it"):
        get_weighting("constant", weights=[1.0, 2.0])


def test_refused_weights_leave_the_old_ones() -> None:
    weights = torch.tensor([1.0, 2.0])
    weighting = get_weighting("constant", weights=weights)

    with pytest.raises(ParameterError, match="`weights` must be a finite"):
        weighting.weights = torch.tensor([1.0, float("inf")])

    assert weighting.weights is weights


def test_a_wrong_number_of_rows_is_named() -> None:
    aggregator = get_aggregator("constant", weights=torch.ones(3))

    with pytest.raises(ParameterError, match="`weights` must be of length 2"):
        aggregator(MATRIX)


def test_the_result_is_a_copy_of_the_weights() -> None:
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    get_weighting("constant", weights=weights)(torch.eye(2, dtype=torch.float64)).zero_()

    assert weights.tolist() == [1.0, 2.0]
