"""What the conformance tests cannot know: the values of the paper's formula, by hand."""

from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, get_aggregator, get_weighting

# Norms 1, 5 and 2; cosines with the first row 1, 3/5 and -1.
ROWS = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]], dtype=torch.float64)
GRAMIAN = ROWS @ ROWS.T


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({}, [1.0, 0.6, 0.0]),
        ({"hard": True}, [1.0, 1.0, 0.0]),
        ({"main": 1}, [0.6, 1.0, 0.0]),
        ({"main": 2}, [0.0, 0.0, 1.0]),
        ({"main": 2, "hard": True}, [0.0, 0.0, 1.0]),
    ],
)
def test_rows_count_by_their_cosine_with_the_main_row(
    arguments: dict[str, object], weights: list[float]
) -> None:
    result = get_weighting("gradient_similarity", **arguments)(GRAMIAN)

    torch.testing.assert_close(result, torch.tensor(weights, dtype=torch.float64))


def test_the_main_row_is_protected_and_its_zero_stops_everything() -> None:
    aggregate = get_aggregator("gradient_similarity")
    stationary = ROWS.clone()
    stationary[0] = 0.0

    assert ROWS[0] @ aggregate(ROWS) >= ROWS[0] @ ROWS[0]
    assert not aggregate(stationary).any()


def test_a_main_objective_that_is_not_there_is_refused() -> None:
    with pytest.raises(ParameterError, match="`main` must be < 3, the number of objectives, got 3"):
        get_weighting("gradient_similarity", main=3)(GRAMIAN)
