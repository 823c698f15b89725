from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jdcore.linalg import combine, equilibrate, factors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 3, 70_000])
def test_the_weighted_sum_is_exact_to_the_dtype_of_the_rows(dtype: torch.dtype, n: int) -> None:
    weights = torch.tensor([1 / 3, -2.0, 0.7], dtype=torch.float64)
    block = torch.randn(3, n).to(dtype)

    result = combine(weights, block)

    assert result.dtype == dtype
    expected = weights @ block.double()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_weights_beyond_float32_are_not_turned_into_infinity() -> None:
    weights = torch.tensor([1e40, 1.0], dtype=torch.float64)
    block = torch.tensor([[1e-30, 0.0], [0.0, 1.0]])

    torch.testing.assert_close(combine(weights, block), torch.tensor([1e10, 1.0]))


def test_the_sum_can_be_differentiated_with_respect_to_the_rows() -> None:
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    block = torch.randn(2, 3, dtype=torch.float16, requires_grad=True)

    combine(weights, block).sum().backward()

    assert torch.equal(block.grad, weights[:, None].half().expand(2, 3))


@given(st.lists(st.floats(-140, 140), min_size=1, max_size=5))
def test_equilibration_separates_scale_and_cosines(exponents: list[float]) -> None:
    rng = np.random.default_rng(len(exponents))
    rows = rng.standard_normal((len(exponents), 6))
    scales = 10.0 ** np.array(exponents)
    scaled = rows * scales[:, None]

    cosines, norms, inverses = equilibrate(scaled @ scaled.T)

    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(norms, lengths * scales, rtol=1e-12)
    np.testing.assert_allclose(inverses, 1.0 / norms, rtol=1e-12)
    np.testing.assert_allclose(cosines, (rows @ rows.T) / np.outer(lengths, lengths), atol=1e-12)
    assert (np.diagonal(cosines) == 1.0).all()


def test_zero_rows_have_zero_cosines_and_zero_inverse_norms() -> None:
    cosines, norms, inverses = equilibrate(np.diag([4.0, 0.0]))

    np.testing.assert_array_equal(cosines, [[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(norms, [2.0, 0.0])
    np.testing.assert_array_equal(inverses, [0.5, 0.0])


@pytest.mark.parametrize(("weight", "dtype"), [(0.5, torch.float32), (1e-60, torch.float64)])
def test_factors_are_as_wide_as_weights_of_any_shape_need(
    weight: float, dtype: torch.dtype
) -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, weight]], dtype=torch.float64)

    assert factors(weights, torch.device("cpu"), wide=False).dtype == dtype
