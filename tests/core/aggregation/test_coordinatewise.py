from __future__ import annotations

import pytest
import torch
from attrs import define, field
from torch import Tensor

from jdcore import (
    BlockwiseAggregator,
    NonDifferentiableError,
    NonFiniteError,
    ParameterError,
)
from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.validators import row_vector


@define(eq=False)
class Largest(CoordinatewiseAggregator):
    """The largest entry of each column, after scaling the rows."""

    factors: Tensor | None = field(default=None, validator=row_vector)
    seen: list[Tensor] = field(factory=list, repr=False)

    def check_rows(self, m: int) -> None:
        if m < 2:
            raise ParameterError("matrix", "of at least 2 rows", f"{m} rows")

    def compute(self, columns: Tensor) -> Tensor:
        self.seen.append(columns)
        factors = 1.0 if self.factors is None else self.factors[:, None]
        return (factors * columns).amax(dim=0)


MATRIX = torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -1.0]])


def test_it_is_a_blockwise_aggregator() -> None:
    aggregator = Largest()

    assert isinstance(aggregator, BlockwiseAggregator)
    assert aggregator(MATRIX).tolist() == [1.0, 5.0, 3.0]


def test_blocks_keep_their_dtypes_and_have_no_weights() -> None:
    vectors, weights = Largest().aggregate_blocks([MATRIX[:, :1].half(), MATRIX[:, 1:].double()])

    assert weights is None
    assert [v.dtype for v in vectors] == [torch.float16, torch.float64]
    assert [v.tolist() for v in vectors] == [[1.0], [5.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    aggregator = Largest()

    vector = aggregator(MATRIX.to(dtype))

    assert vector.dtype == dtype
    assert aggregator.seen[0].dtype == torch.float32


def test_columns_come_in_portions_that_make_up_the_matrix() -> None:
    matrix = torch.randn(50, 20_000, generator=torch.Generator().manual_seed(0))
    aggregator = Largest()

    vector = aggregator(matrix)

    assert torch.equal(vector, matrix.amax(dim=0))
    assert max(columns.numel() for columns in aggregator.seen) <= 1 << 17
    assert torch.equal(torch.cat(aggregator.seen, dim=1), matrix)


def test_a_non_finite_entry_in_any_block_makes_all_vectors_nan() -> None:
    blocks = [MATRIX, torch.tensor([[1.0], [float("inf")]]).half()]
    aggregator = Largest()

    vectors, _ = aggregator.aggregate_blocks(blocks)

    assert [v.dtype for v in vectors] == [torch.float32, torch.float16]
    assert all(bool(v.isnan().all()) for v in vectors)
    assert aggregator.seen == []


def test_a_finite_matrix_whose_sum_overflows_is_no_error() -> None:
    assert Largest()(torch.full((2, 3), 3e38)).tolist() == torch.full((3,), 3e38).tolist()


def test_check_finite_names_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = MATRIX.clone()
    matrix[1, 2] = float("nan")

    with pytest.raises(NonFiniteError) as caught:
        Largest(check_finite=True)(matrix)
    assert caught.value.rows == (1,)

    monkeypatch.setenv("JDCORE_CHECK_FINITE", "1")
    with pytest.raises(NonFiniteError):
        Largest()(matrix)
    assert bool(Largest(check_finite=False)(matrix).isnan().all())


def test_no_rows_give_zeros_and_no_columns_give_nothing() -> None:
    assert Largest()(torch.zeros(0, 3)).tolist() == [0.0, 0.0, 0.0]
    assert Largest()(torch.zeros(2, 0)).shape == (0,)


def test_rows_are_checked_before_anything_is_computed() -> None:
    aggregator = Largest()

    with pytest.raises(ParameterError, match="at least 2 rows, got 1 rows"):
        aggregator(MATRIX[:1])
    with pytest.raises(ParameterError, match="2 rows, as the first"):
        aggregator.aggregate_blocks([MATRIX, MATRIX[:1]])
    with pytest.raises(ParameterError, match="at least one matrix"):
        aggregator.aggregate_blocks([])
    assert aggregator.seen == []


def test_row_vectors_are_checked_against_rows_and_device() -> None:
    assert Largest(factors=torch.tensor([1.0, 0.5]))(MATRIX).tolist() == [1.0, 2.5, 3.0]
    with pytest.raises(ParameterError, match="`factors` must be of length 2"):
        Largest(factors=torch.ones(3))(MATRIX)
    with pytest.raises(ParameterError, match="`factors` must be on cpu"):
        Largest(factors=torch.ones(2, device="meta"))(MATRIX)


def test_differentiating_raises_and_names_the_method() -> None:
    matrix = MATRIX.clone().requires_grad_()
    vector = Largest()(matrix)

    with pytest.raises(NonDifferentiableError, match="Largest"):
        vector.sum().backward()
    with torch.no_grad():
        assert not Largest()(matrix).requires_grad
