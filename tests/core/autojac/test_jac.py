from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore.autojac import jac
from tests.core.autojac.conftest import Truth


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_one_jacobian_per_input_and_no_field_changes(truth: Truth, chunk_size: int | None) -> None:
    a, b = _leaf(3), _leaf(2, 2)
    outputs = [a.prod() * b, a.sin()]
    expected = truth(outputs, [b, a])
    result = jac(outputs, [b, a], parallel_chunk_size=chunk_size)
    assert isinstance(result, tuple)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want)
    for leaf in (a, b):
        assert leaf.grad is None
        assert not hasattr(leaf, "jac")


def test_repeated_inputs_are_answered_each() -> None:
    a = _leaf(2)
    first, second = jac(a * 3, [a, a])
    torch.testing.assert_close(first, second)


def test_unused_inputs_give_zeros() -> None:
    a, b = _leaf(2), _leaf(3)
    _, unused = jac(a * 3, [a, b])
    assert unused.shape == (2, 3)
    assert unused.eq(0).all()


def test_the_inputs_default_to_the_leaves() -> None:
    a, b = _leaf(2), _leaf(2)
    assert [j.shape for j in jac((a * b).sum())] == [(1, 2), (1, 2)]


def test_the_chain_rule_composes_calls(truth: Truth) -> None:
    a = _leaf(3)
    hidden = a.sin()
    losses = hidden.cumprod(0)
    [expected] = truth([losses], [a])
    first = jac(losses, hidden)
    [second] = jac(hidden, a, jac_outputs=first)
    torch.testing.assert_close(second, expected)
