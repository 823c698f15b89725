"""What one aggregation costs in calls: for a few rows, that is what takes the time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import (
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    ScalarizationWeighting,
    equal_weights,
)
from jdcore.linalg import combine
from jdcore.linalg._combine import combine_blocks
from tests.operations import Operations


@define(eq=False)
class Shorter(GramianWeighting):
    """Long rows count for less."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / np.sqrt(gramian.diagonal())


@define(eq=False)
class Equal(ScalarizationWeighting):
    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return equal_weights(1.0, m, dtype)


def _operations(step: Callable[[], Any]) -> Counter[str]:
    step()
    with Operations() as operations:
        step()
    return operations.counts


def _python_calls(step: Callable[[], Any]) -> int:
    """Calls of Python functions, without those of numpy, of which older versions have more."""
    count = 0
    theirs = str(Path(np.__file__).parent)

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and not frame.f_code.co_filename.startswith((theirs, "<__array_f"))

    step()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def test_weights_that_ask_for_nothing_cost_a_product_and_a_look_at_its_result() -> None:
    aggregator, matrix = GramianAggregator(Equal()), torch.randn(2, 1000)
    counts = _operations(lambda: aggregator(matrix))
    products = counts.pop("mv", 0) + counts.pop("mm", 0)
    assert products == 1
    # To see a row as a matrix, to square what was found, and to read the number.
    assert counts.total() <= 5, counts
    assert _python_calls(lambda: aggregator(matrix)) <= 17


def test_a_few_rows_are_multiplied_without_an_operation_of_torch() -> None:
    aggregator, matrix = GramianAggregator(Shorter()), torch.randn(2, 1000)
    counts = _operations(lambda: aggregator(matrix))
    assert not counts.keys() & {"mm", "mv", "maximum", "_to_copy", "dot"}, counts
    assert _python_calls(lambda: aggregator(matrix)) <= 18


def test_warnings_of_numpy_are_silenced_only_where_there_may_be_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered = []
    monkeypatch.setattr(np, "errstate", lambda **how: entered.append(how) or nullcontext())
    aggregator = GramianAggregator(Shorter())
    for length in (1e-30, 1.0, 1e15):
        aggregator(length * torch.randn(3, 50))
    assert not entered
    aggregator(torch.full((3, 50), 1e25))  # whose squares leave the range of float32
    assert len(entered) == 1


def test_a_few_rows_in_blocks_are_multiplied_without_an_operation_of_torch() -> None:
    aggregator = GramianAggregator(Shorter())
    blocks = [torch.randn(3, n) for n in (5, 0, 64, 1)]
    counts = _operations(lambda: aggregator.aggregate_blocks(blocks))
    assert not counts.keys() & {"mm", "mv", "cat", "copy_"}, counts
    vectors, weights = aggregator.aggregate_blocks(blocks)
    whole = aggregator(torch.cat(blocks, 1))
    assert [len(vector) for vector in vectors] == [5, 0, 64, 1]
    torch.testing.assert_close(torch.cat(vectors), whole, rtol=1e-6, atol=1e-6)
    expected = weights.double() @ torch.cat(blocks, 1).double()
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "few", "many"), [(5, 4, 40), (1000, 4, 40), (10_000, 5, 15)])
def test_operations_do_not_grow_with_the_number_of_small_blocks(
    length: int, few: int, many: int
) -> None:
    aggregator = GramianAggregator(Shorter())

    def counted(count: int) -> Counter[str]:
        blocks = [torch.randn(3, length) for _ in range(count)]
        counts = _operations(lambda: aggregator.aggregate_blocks(blocks))
        # Copies into one buffer, and views of blocks and results.
        for name in ("copy_", "slice", "detach", "alias"):
            counts.pop(name, None)
        return counts

    assert counted(many) == counted(few)


@pytest.mark.parametrize(("m", "n"), [(12, 1000), (20, 5000), (100, 400)])
def test_rows_are_converted_to_float64_once(m: int, n: int) -> None:
    aggregator, half = GramianAggregator(Shorter()), torch.randn(m // 2, n)
    # Rows that cancel: their sum is made in float64.
    matrix = torch.cat([half, 1e-6 * torch.randn(m // 2, n) - half])
    blocks = list(matrix.split([n - 7, 0, 7], dim=1))
    of_matrix = _operations(lambda: aggregator(matrix))
    of_blocks = _operations(lambda: aggregator.aggregate_blocks(blocks))
    # The rows, for the Gramian and for the sum; and their sum back. The weights go to a device.
    for counts, most in ((of_matrix, 2), (of_blocks, 3)):
        assert counts["_to_copy"] + counts["copy_"] <= most, counts
    expected = aggregator(matrix.double())
    for update in (aggregator(matrix), torch.cat(aggregator.aggregate_blocks(blocks)[0])):
        torch.testing.assert_close(update.double(), expected, rtol=1e-6, atol=1e-12)


def test_small_blocks_are_summed_together_and_come_back_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 40_000, 0, 5, 7, 70_000, 1]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    blocks = [
        torch.randn(4, n, generator=generator).to(dtypes[i % len(dtypes)])
        for i, n in enumerate(sizes)
    ]
    weights = torch.tensor([0.3, -2.0, 1 / 3, 5.0], dtype=torch.float64)
    for wide in (False, True):
        found = combine_blocks(weights, blocks, wide=wide)
        for vector, block in zip(found, blocks, strict=True):
            assert vector.dtype == block.dtype
            torch.testing.assert_close(vector, combine(weights, block, wide=wide))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7F800000])
def test_rows_with_any_nan_or_infinity_warn_of_nothing(bits: int) -> None:
    matrix = torch.ones(3, 5)
    matrix.view(torch.int32)[1, 2] = bits  # the first one is a NaN that signals
    assert GramianAggregator(Shorter())(matrix).isnan().all()


@pytest.mark.parametrize("length", [1e-44, 1e-30, 1e-19, 1.0, 1e18, 1e20, 3e38])
def test_a_few_rows_of_any_length_are_summed_as_in_float64(length: float) -> None:
    matrix = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)).sign() * length
    for factor in (1e-40, 1.0, 1e38, 1e77, 1e300):
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64) * factor
        aggregator = GramianAggregator(lambda gramian, weights=weights: weights + 0.0 * gramian[0])
        expected = (weights @ matrix.double()).float()
        torch.testing.assert_close(aggregator(matrix), expected, rtol=1e-6, atol=1e-45)


def test_non_finite_rows_and_overflow_of_a_few_rows_warn_of_nothing() -> None:
    aggregator = GramianAggregator(Shorter())
    broken = torch.tensor([[torch.inf, 1.0], [2.0, 3.0]])
    assert aggregator(broken).isnan().all()
    huge = torch.tensor([[3e38, 0.0], [3e38, 1.0]])
    assert GramianAggregator(lambda gramian: torch.ones(2).double())(huge)[0] == torch.inf


@pytest.mark.parametrize("method", [Shorter(), Equal()])
def test_a_few_rows_may_lie_in_memory_in_any_way(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    complex_ = torch.randn(3, 5, dtype=torch.complex64, generator=generator)
    wide = torch.randn(6, 10, generator=generator)
    views = [
        complex_.conj().imag,
        complex_.real,
        wide[::2, ::3],
        wide.T[:4],
        wide[:1].expand(3, 10),
    ]
    for view in [*views, wide[:0]]:
        aggregator = GramianAggregator(method)
        torch.testing.assert_close(aggregator(view), aggregator(view.clone().contiguous()))


class _Elsewhere:
    """A Gramian on a device, for which the host waits when it is copied."""

    is_cpu = False

    def __init__(self, gramian: Tensor) -> None:
        self.gramian, self.copies = gramian, 0

    def __len__(self) -> int:
        return len(self.gramian)

    def cpu(self) -> Tensor:
        self.copies += 1
        return self.gramian


def test_the_host_waits_for_the_gramian_of_a_device_once() -> None:
    elsewhere: Any = _Elsewhere(torch.eye(2, dtype=torch.float64))
    source = GramianSource(2, torch.float32, torch.device("cpu"), lambda: elsewhere)
    weights = Shorter().weigh(source)
    assert not source.rounding_shows(weights)
    assert torch.equal(weights, torch.ones(2, dtype=torch.float64))
    assert elsewhere.copies == 1
