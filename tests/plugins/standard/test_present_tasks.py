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


ARGUMENTS: dict[str, dict[str, Any]] = {
    "krum": {"n_byzantine": 1},
    "trimmed_mean": {"trim_number": 1},
    "constant": {"weights": torch.ones(4)},
    "nash_mtl": {"n_tasks": 4},
    "gradvac": {},
    "moco": {},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_where_no_task_is_present_the_method_is_not_asked(name: str) -> None:
    inner = get_aggregator(name, **ARGUMENTS[name])
    aggregator = get_aggregator("present_tasks", aggregator=inner)
    matrix = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [1.0, 0.5]])

    # Neither a number of rows nor of arguments nor of what is in a state has to fit then.
    assert aggregator(torch.zeros(4, 2)).tolist() == [0.0, 0.0]
    before = aggregator(matrix)
    aggregator.present = torch.zeros(4)
    assert aggregator(matrix).tolist() == [0.0, 0.0]
    aggregator.present = None
    assert before.isfinite().all()
    assert aggregator(matrix).isfinite().all()


@pytest.mark.parametrize("name", ["mgda", "coordinate_wise_median"])
def test_absent_rows_of_nan_are_told_where_no_task_is_present(name: str) -> None:
    pytest.importorskip("jdplugins.robust")
    aggregator = get_aggregator(
        "present_tasks", aggregator=get_aggregator(name), present=torch.zeros(3)
    )

    assert aggregator(torch.full((3, 2), torch.nan)).isnan().all()
    if aggregator.weighting is not None:
        assert aggregator.weighting(torch.full((3, 3), torch.nan)).isnan().all()
        assert aggregator.weighting(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("where", ["sparse", "meta"])
def test_a_mask_without_entries_to_read_is_refused(where: str) -> None:
    mask = torch.ones(3).to_sparse() if where == "sparse" else torch.ones(3, device=where)

    with pytest.raises(ParameterError, match="`present` must be a vector with one entry"):
        get_aggregator("present_tasks", aggregator=get_aggregator("mean"), present=mask)
