"""The form of a weighting in plain floats, which is asked first for up to eight rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray

from jdcore.aggregation import GramianAggregator, GramianWeighting
from jdcore.errors import NonFiniteError


@define(eq=False)
class TwoFormsWeighting(GramianWeighting):
    """The weights tell which form computed them: 1 in arrays, 2 in floats."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.ones(len(gramian))

    def compute_few(self, gramian: list[list[float]]) -> list[float] | None:
        assert all(isinstance(entry, float) for row in gramian for entry in row)
        return None if gramian[0][0] == 0.0 else [2.0] * len(gramian)


@define(eq=False)
class OverridingWeighting(TwoFormsWeighting):
    """Computes something else."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(gramian), 3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_asked_first_for_up_to_eight_rows(dtype: torch.dtype) -> None:
    weighting, aggregator = TwoFormsWeighting(), GramianAggregator(TwoFormsWeighting())

    for m, weight in ((0, 2), (1, 2), (8, 2), (9, 1)):
        matrix = torch.eye(m, dtype=dtype)
        assert weighting(matrix).tolist() == [weight] * m
        assert weighting(matrix).dtype == dtype
        assert aggregator(matrix).tolist() == [weight] * m
        vectors, weights = aggregator.aggregate_blocks([matrix, matrix])
        assert [vector.tolist() for vector in vectors] == [[weight] * m] * 2
        assert weights.tolist() == [weight] * m
        assert weights.dtype == dtype


def test_arrays_are_asked_where_floats_have_no_answer() -> None:
    matrix = torch.tensor([[0.0, 0.0], [0.0, 1.0]])

    assert GramianAggregator(TwoFormsWeighting())(matrix).tolist() == [0.0, 1.0]


def test_who_overrides_compute_does_not_inherit_the_form_in_floats() -> None:
    assert GramianAggregator(OverridingWeighting())(torch.eye(2)).tolist() == [3.0, 3.0]


def test_neither_form_sees_what_is_not_finite() -> None:
    matrix = torch.tensor([[1.0, torch.inf], [0.0, 1.0]])

    assert GramianAggregator(TwoFormsWeighting())(matrix).isnan().all()
    with pytest.raises(NonFiniteError):
        GramianAggregator(TwoFormsWeighting(check_finite=True))(matrix)


def test_rows_of_extreme_scale_reach_it_rescaled() -> None:
    matrix = torch.tensor([[1e200, 0.0], [0.0, 1e200]], dtype=torch.float64)

    assert GramianAggregator(TwoFormsWeighting())(matrix).tolist() == [2e200, 2e200]
