from __future__ import annotations

from typing import Any

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator

MATRIX = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])


@pytest.mark.parametrize("name", ["mgda", "mean", "imtl_g", "graddrop", "cagrad"])
def test_an_absent_task_takes_no_part(name: str) -> None:
    arguments: dict[str, Any] = {"c": 0.5} if name == "cagrad" else {}
    if name == "graddrop":
        arguments["generator"] = torch.Generator().manual_seed(0)
    inner = get_aggregator(name, **arguments)
    if name == "graddrop":
        arguments["generator"] = torch.Generator().manual_seed(0)
    expected = get_aggregator(name, **arguments)(MATRIX[[0, 2]])

    torch.testing.assert_close(get_aggregator("present_tasks", aggregator=inner)(MATRIX), expected)


def test_weights_of_absent_tasks_are_zero() -> None:
    _, weights = get_aggregator(
        "present_tasks", aggregator=get_aggregator("mgda")
    ).aggregate_blocks([MATRIX])

    assert weights.tolist() == [0.5, 0.0, 0.5]


def test_a_mask_leaves_out_rows_that_are_not_zero_and_keeps_those_that_are() -> None:
    aggregator = get_aggregator("present_tasks", aggregator=get_aggregator("mean"))
    matrix = torch.tensor([[2.0, 0.0], [0.0, 9.0], [0.0, 0.0]])

    aggregator.present = torch.tensor([True, False, True])
    assert aggregator(matrix).tolist() == [1.0, 0.0]
    aggregator.present = torch.tensor([1.0, 1.0, 0.0])
    assert aggregator(matrix).tolist() == [1.0, 4.5]


def test_where_no_task_is_present_the_update_is_zero() -> None:
    aggregator = get_aggregator("present_tasks", aggregator=get_aggregator("mgda"))

    assert aggregator(torch.zeros(3, 2)).tolist() == [0.0, 0.0]
    aggregator.present = torch.zeros(3, dtype=torch.bool)
    assert aggregator(MATRIX).tolist() == [0.0, 0.0]


def test_a_mask_of_another_length_is_refused() -> None:
    aggregator = get_aggregator(
        "present_tasks", aggregator=get_aggregator("mean"), present=torch.ones(2, dtype=torch.bool)
    )

    with pytest.raises(ParameterError, match="`present` must be of length 3"):
        aggregator(MATRIX)
    with pytest.raises(ParameterTypeError, match="`present` must be a vector with one entry"):
        aggregator.present = [True, False, True]


def test_losses_of_absent_tasks_are_left_out() -> None:
    normalized = get_aggregator("row_normalized", aggregator=get_aggregator("mgda"), by="loss")
    aggregator = get_aggregator("present_tasks", aggregator=normalized)

    vector = aggregator(MATRIX, losses=torch.tensor([2.0, 0.0, 2.0]))

    torch.testing.assert_close(vector, torch.tensor([0.5, 0.5]))
