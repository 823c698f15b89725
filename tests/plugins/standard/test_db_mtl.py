from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, get_aggregator


def test_two_calls_by_hand() -> None:
    # Rows of the logarithms: (2, 0) and (0, 1); Y is a tenth of them, then .19. All as long as
    # the longest.
    matrix = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    losses = torch.tensor([2.0, 1.0])
    aggregator = get_aggregator("db_mtl")

    first, second = (aggregator(matrix, losses=losses) for _ in range(2))

    torch.testing.assert_close(first, torch.tensor([0.2, 0.2], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([0.38, 0.38], dtype=torch.float64))


def test_the_rows_are_those_of_the_logarithms_of_the_losses() -> None:
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    data = torch.tensor([[1.0, 2.0, 3.0], [2.0, -1.0, 0.5]], dtype=torch.float64)
    losses = (data @ weight).square() + 1.0
    rows = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    logs = [torch.autograd.grad(loss.log(), weight, retain_graph=True)[0] for loss in losses]
    longest = max(row.norm() for row in logs)

    vector = get_aggregator("db_mtl", beta=0.0)(torch.stack(rows), losses=losses)

    torch.testing.assert_close(vector, sum(longest * row / row.norm() for row in logs))


def test_without_a_past_nothing_is_kept_and_shapes_may_change() -> None:
    aggregator = get_aggregator("db_mtl", beta=0.0)

    aggregator(torch.ones(2, 3), losses=torch.ones(2))
    assert aggregator.history.numel() == 0
    assert aggregator(torch.ones(3, 5), losses=torch.ones(3)).tolist() == [3.0] * 5


def test_the_past_may_fade() -> None:
    aggregator = get_aggregator("db_mtl", beta=0.5, beta_sigma=1.0)
    losses = torch.ones(1)

    # Half of the first row, then 1/4 of that and 3/4 of the second.
    aggregator(torch.tensor([[8.0]]), losses=losses)
    assert aggregator(torch.tensor([[4.0]]), losses=losses).tolist() == [4.0]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_losses_without_a_logarithm_are_refused_and_change_nothing(value: float) -> None:
    aggregator = get_aggregator("db_mtl")
    aggregator(torch.eye(2), losses=torch.ones(2))
    before = repr(aggregator.state_dict())

    with pytest.raises(ParameterError, match="`losses` must be positive: their logarithms"):
        aggregator(torch.eye(2), losses=torch.tensor([1.0, value]))
    assert repr(aggregator.state_dict()) == before


def test_a_zero_row_stays_zero() -> None:
    matrix = torch.tensor([[0.0, 0.0], [3.0, 4.0]])

    vector = get_aggregator("db_mtl", beta=0.0)(matrix, losses=torch.ones(2))

    torch.testing.assert_close(vector, matrix[1])


@pytest.mark.parametrize("exponent", [1e300, 10**18])
def test_a_past_that_decays_at_once_is_forgotten(exponent: float) -> None:
    aggregator = get_aggregator("db_mtl", beta_sigma=exponent)
    losses = torch.ones(2)
    aggregator(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), losses=losses)

    vector = aggregator(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), losses=losses)

    assert vector.tolist() == [4.0, 4.0]
