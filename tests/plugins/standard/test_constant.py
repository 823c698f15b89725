from __future__ import annotations

import pytest
import torch

from jdcore import ParameterTypeError, autogram, get_aggregator, get_weighting
from jdcore.aggregation import ConstantWeighting, GramianAggregator, MeanWeighting
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad

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


def test_the_result_is_a_copy_of_the_weights() -> None:
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    get_weighting("constant", weights=weights)(torch.eye(2, dtype=torch.float64)).zero_()

    assert weights.tolist() == [1.0, 2.0]


def test_the_weights_that_a_step_returns_may_be_overwritten() -> None:
    layer = torch.nn.Linear(3, 1)
    weights = torch.tensor([1.0, 2.0])
    rows = torch.ones(2, 3)
    for weighting in (ConstantWeighting(weights), MeanWeighting()):
        expected = GramianAggregator(weighting)(rows)

        losses = [layer(rows).squeeze(1) for _ in range(5)]
        returned = [
            Engine(layer, batch_dim=0).backward(losses[0], weighting),
            Engine(layer, batch_dim=None).backward(losses[1], weighting),
            autogram.backward(losses[2], weighting, batch_dim=0),
            gramian_backward(losses[3], weighting),
            weighting(torch.eye(2)),
            GramianAggregator(weighting).aggregate_blocks([rows])[1],
        ]
        backward(losses[4])
        told = jac_to_grad(layer.parameters(), GramianAggregator(weighting))
        assert told is not None
        for tensor in [*returned, told]:
            tensor.zero_()

        assert torch.equal(GramianAggregator(weighting)(rows), expected)
    assert weights.tolist() == [1.0, 2.0]
