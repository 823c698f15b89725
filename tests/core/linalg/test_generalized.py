from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jdcore import ParameterError
from jdcore.linalg import flatten_gramian, gramian, unflatten_gramian


@given(st.lists(st.integers(1, 3), max_size=3))
def test_entries_pair_the_gradients_of_two_losses_with_the_second_index_reversed(
    shape: list[int],
) -> None:
    gradients = torch.randn(*shape, 4, dtype=torch.float64)
    indices = list(itertools.product(*map(range, shape)))
    m = gradients.reshape(-1, 4).shape[0]

    generalized = unflatten_gramian(gramian(gradients.reshape(m, 4)), shape)

    assert list(generalized.shape) == shape + shape[::-1]
    for i, j in itertools.product(indices, repeat=2):
        expected = (gradients[i] * gradients[j]).sum()
        torch.testing.assert_close(generalized[i + j[::-1]], expected)


@given(st.lists(st.integers(1, 3), max_size=3))
def test_flattening_undoes_unflattening(shape: list[int]) -> None:
    m = int(torch.tensor(shape).prod()) if shape else 1
    matrix = torch.randn(m, m)

    assert torch.equal(flatten_gramian(unflatten_gramian(matrix, shape)), matrix)


def test_shapes_that_do_not_mirror_are_refused() -> None:
    with pytest.raises(ParameterError, match="`gramian` must be a generalized Gramian of shape"):
        flatten_gramian(torch.ones(2, 3, 2, 3))
    with pytest.raises(ParameterError, match="`gramian` must be a generalized Gramian of shape"):
        flatten_gramian(torch.ones(2, 3, 2))
    with pytest.raises(ParameterError, match=r"`gramian` must be of shape \[6, 6\], got a float32"):
        unflatten_gramian(torch.ones(5, 5), (2, 3))
