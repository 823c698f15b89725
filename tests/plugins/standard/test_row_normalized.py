from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, get_aggregator, to_config
from jdcore.autogram import Engine

MATRIX = torch.tensor([[8.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
LOSSES = torch.tensor([4.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("none", [[8.0, 0.0], [0.0, 2.0]]),
        ("l2", [[1.0, 0.0], [0.0, 1.0]]),
        ("loss", [[2.0, 0.0], [0.0, 4.0]]),
        ("loss+", [[0.25, 0.0], [0.0, 2.0]]),
    ],
)
def test_the_method_sees_rows_divided_by_hand(by: str, rows: list[list[float]]) -> None:
    expected = get_aggregator("mgda")(torch.tensor(rows, dtype=torch.float64))

    vector = get_aggregator("row_normalized", aggregator=get_aggregator("mgda"), by=by)(
        MATRIX, losses=LOSSES
    )

    torch.testing.assert_close(vector, expected)


def test_a_method_of_single_coordinates_sees_them_too() -> None:
    matrix = torch.tensor([[3.0, 4.0], [30.0, -40.0], [0.3, 0.4]])
    expected = torch.tensor([0.6, 0.8])

    median = get_aggregator(
        "row_normalized", aggregator=get_aggregator("trimmed_mean", trim_number=1)
    )

    torch.testing.assert_close(median(matrix), expected)


def test_norms_far_out_of_range_are_divided_out() -> None:
    aggregator = get_aggregator("row_normalized", aggregator=get_aggregator("sum"))
    for scale in (1e-300, 1e-30, 1e30, 1e300):
        vector = aggregator(MATRIX * scale)
        torch.testing.assert_close(vector, torch.ones(2, dtype=torch.float64))


def test_rows_whose_lengths_have_no_inverse_stay_as_they_are() -> None:
    aggregator = get_aggregator("row_normalized", aggregator=get_aggregator("sum"))
    for scale in (1e-310, 5e-324):
        assert torch.equal(aggregator(MATRIX * scale), (MATRIX * scale).sum(0))


def test_losses_are_needed_by_two_choices_only() -> None:
    for by in ("none", "l2"):
        get_aggregator("row_normalized", aggregator=get_aggregator("mgda"), by=by)(MATRIX)
    for by in ("loss", "loss+"):
        with pytest.raises(ParameterError, match=r"`losses` must be given.*jac_to_grad"):
            get_aggregator("row_normalized", aggregator=get_aggregator("mgda"), by=by)(MATRIX)


def test_losses_that_are_not_positive_are_refused() -> None:
    aggregator = get_aggregator("row_normalized", aggregator=get_aggregator("mgda"), by="loss")

    with pytest.raises(ParameterError, match="`losses` must be positive: rows are divided by"):
        aggregator(MATRIX, losses=torch.tensor([1.0, 0.0]))


def test_it_has_a_weighting_for_autogram_and_a_configuration() -> None:
    aggregator = get_aggregator("row_normalized", aggregator=get_aggregator("mgda"))
    model = torch.nn.Linear(2, 1)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.tensor([[1.0, 0.0], [0.0, 8.0]])).squeeze(1)

    weights = engine.backward(losses, aggregator)

    assert weights.shape == (2,)
    assert to_config(aggregator) == {"name": "row_normalized", "aggregator": {"name": "mgda"}}


@pytest.mark.parametrize("name", ["mean", "trimmed_mean"])
def test_rows_whose_inverse_lengths_float32_cannot_hold_are_normalized(name: str) -> None:
    arguments = {"trim_number": 0} if name == "trimmed_mean" else {}
    inner = get_aggregator(name, **arguments)
    aggregator = get_aggregator("row_normalized", aggregator=inner)

    assert aggregator(1e-39 * torch.eye(2)).tolist() == pytest.approx([0.5, 0.5])
