from __future__ import annotations

import sys

import pytest
import torch

from jdcore.linalg import _pages, combine


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0, 5), (3, 1024, 1024)])
def test_new_tensors_are_as_those_of_torch(shape: tuple[int, ...]) -> None:
    like = torch.ones(1, dtype=torch.float64)

    tensor = _pages.new_tensor(like, *shape)

    assert tensor.shape == shape
    assert tensor.dtype == torch.float64
    assert tensor.is_contiguous()
    assert tensor.fill_(7.0).eq(7.0).all()


def test_large_tensors_are_advised_whole_pages_within_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(_pages, "_madvise", lambda: lambda *a: asked.append(a))

    _pages.new_tensor(torch.ones(1), 1000)
    tensor = _pages.new_tensor(torch.ones(1), 2_000_001)

    [(start, length, _)] = asked
    assert start % 4096 == length % 4096 == 0
    assert tensor.data_ptr() <= start
    assert start + length <= tensor.data_ptr() + tensor.nbytes
    assert length > tensor.nbytes - 2 * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="advice is asked of Linux only")
def test_advice_of_the_kernel_is_taken_or_ignored_without_error() -> None:
    advise = _pages._madvise()
    assert advise is not None
    assert advise(0, 0, 14) in (0, -1)


def test_no_advice_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert _pages._madvise.__wrapped__() is None


def test_long_sums_of_rows_are_those_of_short_ones() -> None:
    block = torch.randn(3, 700_001)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    result = combine(weights, block)

    torch.testing.assert_close(result.double(), weights @ block.double(), rtol=1e-5, atol=1e-6)
