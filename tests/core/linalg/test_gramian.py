from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from jdcore import ParameterError, ParameterTypeError
from jdcore.linalg import _gramian, cross_gramian, gramian
from jdcore.linalg._blas import short_columns
from jdcore.linalg._gramian import sum_gramians
from tests.operations import Operations


def longhand(matrix: Tensor) -> Tensor:
    rows = matrix.double()
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entries_are_the_inner_products_of_the_rows_in_float64(dtype: torch.dtype) -> None:
    matrix = torch.randn(4, 30).to(dtype)

    result = gramian(matrix)

    assert result.dtype == torch.float64
    torch.testing.assert_close(result, longhand(matrix), rtol=1e-14, atol=1e-14)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 5))
def test_blocks_give_the_gramian_of_their_concatenation(widths: list[int], m: int) -> None:
    generator = torch.Generator().manual_seed(sum(widths))
    blocks = [torch.randn(m, n, generator=generator) for n in widths]

    result = gramian(blocks)

    torch.testing.assert_close(result, gramian(torch.cat(blocks, dim=1)), rtol=1e-13, atol=1e-13)


def test_blocks_may_differ_in_dtype() -> None:
    blocks = [torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.bfloat16)]

    expected = gramian(torch.cat([b.double() for b in blocks], dim=1))

    torch.testing.assert_close(gramian(blocks), expected)


def test_long_correlated_float32_rows_lose_no_digits() -> None:
    rows = torch.ones(2, 1_000_000) + 0.01 * torch.randn(2, 1_000_000)

    relative = (gramian(rows) - longhand(rows)).abs().max() / longhand(rows).max()

    assert relative < 1e-13


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_float32_scale_overflows_or_underflows(scale: float) -> None:
    matrix = torch.randn(3, 20) * scale

    result = gramian(matrix)

    torch.testing.assert_close(result / scale**2, longhand(matrix / scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [10, 50_000])
def test_the_result_is_exactly_symmetric(n: int) -> None:
    result = gramian(torch.randn(5, n))

    assert torch.equal(result, result.T)


def test_the_jacobian_is_left_alone() -> None:
    matrix = torch.randn(3, 40_000)
    copy = matrix.clone()

    gramian(matrix)

    assert torch.equal(matrix, copy)


def test_malformed_jacobians_are_refused() -> None:
    with pytest.raises(ParameterError, match="`jacobian` must be at least one matrix, got none"):
        gramian([])
    with pytest.raises(ParameterError, match="matrices with 2 rows, as the first, got a float32"):
        gramian([torch.ones(2, 3), torch.ones(3, 3)])
    with pytest.raises(ParameterError, match=r"Flatten each row: jacobian.flatten\(1\)"):
        gramian(torch.ones(2, 3, 4))
    with pytest.raises(ParameterTypeError, match="of a real floating dtype, got a complex64"):
        gramian(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ParameterTypeError, match="of a real floating dtype, got a float8_e5m2"):
        gramian(torch.ones(2, 3).to(torch.float8_e5m2))  # of which torch makes no sum
    with pytest.raises(ParameterTypeError, match="a Tensor of shape"):
        gramian([[1.0]])  # type: ignore[list-item]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9, 64, 65, 200])
def test_pieces_of_all_widths_count_once(m: int) -> None:
    columns = short_columns(m) if m in _gramian._SHORT else max(1024, 2**16 // m)
    widths = [columns - 1, 3, columns, 0, columns + 1, 2 * columns, 5]
    blocks = [torch.randint(-4, 5, (m, n)).to(torch.float32) for n in widths]

    expected = torch.cat(blocks, dim=1).double()

    assert torch.equal(gramian(blocks), expected @ expected.T)  # sums of integers are exact


@pytest.mark.parametrize("m", [2, 5, 16, 33])
def test_rows_that_cancel_keep_the_digits_that_their_products_have_in_float64(m: int) -> None:
    torch.manual_seed(m)
    rows = torch.randn(m, 30_000)
    # Their sum is a hundred thousand times shorter than they are: float32 products would drown it.
    rows[-1] = -rows[:-1].sum(0) + 1e-5 * torch.randn(30_000)
    wide = rows.double()
    direction = torch.ones(m, dtype=torch.float64)

    squared = direction @ gramian(rows) @ direction

    torch.testing.assert_close(squared, (wide.sum(0) ** 2).sum(), rtol=1e-2, atol=0.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e200])
@pytest.mark.parametrize("n", [20_000, 60_000])
def test_entries_out_of_range_show_in_the_products_of_their_row_alone(value: float, n: int) -> None:
    rows = torch.ones(3, n, dtype=torch.float64)
    rows[1, 7] = value

    result = gramian(rows)

    assert not result[1].isfinite().any() if value != 1e200 else result[1, 1] == float("inf")
    assert torch.equal(result[[0, 2]][:, [0, 2]], torch.full((2, 2), float(n)).double())


# -- on accelerators -------------------------------------------------------------------------------


def _operations(step: Callable[[], object]) -> int:
    """Dispatched operations that are no views."""
    views = {"slice", "view", "transpose", "t", "unsafe_view", "detach", "unflatten", "as_strided"}

    with Operations() as operations:
        step()
    return sum(count for name, count in operations.counts.items() if name not in views)


def test_on_accelerators_the_calls_do_not_grow_with_the_number_of_blocks() -> None:
    def calls(blocks: int) -> int:
        # Tensors on the meta device are no CPU tensors either, and reading a value of theirs fails.
        jacobian = [torch.empty(4, 10 + k, device="meta") for k in range(blocks)]
        return _operations(lambda: sum_gramians(jacobian))

    assert calls(5) == calls(100) <= 12
    sum_gramians([torch.empty(4, 0, device="meta")])


@pytest.mark.parametrize(
    "widths",
    [[3], [5000], [4096, 4096], [7, 4089, 1, 4096, 20_000], [1] * 50, [0, 3], [0], [4097, 8191]],
)
@pytest.mark.parametrize("columns", [4096, 8192, 1 << 16])
def test_products_in_batches_are_those_of_the_whole_matrix(widths: list[int], columns: int) -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(3, width) for width in widths]
    pieces = list(_gramian._pieces(blocks, columns))
    total = _gramian._sum_in_batches(torch.zeros(3, 3, dtype=torch.float64), pieces, columns)
    matrix = torch.cat(blocks, dim=1).double()
    torch.testing.assert_close(total, matrix @ matrix.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("jacobian", [None, 1.0, object()])
def test_what_is_neither_a_matrix_nor_a_list_is_refused_by_name(jacobian: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`jacobian` must be a matrix, or a list of them"):
        gramian(jacobian)
    with pytest.raises(ParameterTypeError, match="`other` must be a matrix, or a list of them"):
        cross_gramian(torch.ones(2, 3), jacobian)


SHAPES = [(3, 4000), (12, 12_000), (64, 600), (64, 2100), (100, 40), (100, 1500), (260, 4)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("cut", [1, 0])
def test_rows_beside_which_something_else_is_differentiated_are_multiplied_as_ever(
    m: int, n: int, cut: int
) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    blocks = [matrix[:, :cut], matrix[:, cut:]] if cut else matrix
    expected = matrix.double() @ matrix.double().T

    with forward_ad.dual_level():
        torch.testing.assert_close(gramian(blocks), expected)
    derivative = torch.func.grad(lambda factor: (factor * gramian(blocks)).sum())
    torch.testing.assert_close(derivative(torch.ones((), dtype=torch.float64)), expected.sum())


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("cut", [1, 0])
def test_rows_may_be_differentiated_themselves(m: int, n: int, cut: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    expected = (matrix.double() @ matrix.double().T).sum()

    def total(factor: torch.Tensor) -> torch.Tensor:
        rows = factor * matrix
        return gramian([rows[:, :cut], rows[:, cut:]] if cut else rows).sum()

    one = torch.ones(())
    leaf = one.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(one, one)
        tangent = forward_ad.unpack_dual(total(dual)).tangent
    for derivative in (
        tangent,
        *torch.autograd.grad(total(leaf), leaf),
        torch.func.grad(total)(one),
    ):
        torch.testing.assert_close(derivative.double(), 2 * expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(torch.func.functionalize(total)(one), expected)
