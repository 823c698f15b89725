"""Losses whose mean over processes is that of all samples, on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jdcore import ParameterError, ParameterTypeError
from jdcore.distributed import global_means

SUMS = [torch.tensor(6.0), torch.tensor(4.0)]


@pytest.mark.parametrize("counts", [[3, 2], (3, 2), torch.tensor([3, 2]), np.array([3.0, 2.0])])
@pytest.mark.parametrize("sums", [SUMS, tuple(SUMS), torch.stack(SUMS)])
def test_sums_are_divided_by_their_counts(sums: Any, counts: Any) -> None:
    assert torch.stack(global_means(sums, counts)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "sums", [None, 1.0, "ab", [6.0, 4.0], torch.tensor(6.0), torch.ones(2, 1), [torch.ones(1)] * 2]
)
def test_sums_that_are_no_scalar_tensors_are_refused(sums: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`sums` must be a vector, or a list of Tensors"):
        global_means(sums, [3, 2])


@pytest.mark.parametrize("counts", [None, "ab", object(), [None, 1], [[1], [2, 3]], [10**400, 1]])
def test_counts_that_are_no_numbers_are_refused(counts: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`counts` must be 2 numbers, one for each sum"):
        global_means(SUMS, counts)


@pytest.mark.parametrize("counts", [[3, -2], [3, torch.inf], [torch.nan, 2], [1, 2, 3], 3])
def test_counts_of_other_values_are_refused(counts: Any) -> None:
    with pytest.raises(ParameterError, match="`counts` must be"):
        global_means(SUMS, counts)
