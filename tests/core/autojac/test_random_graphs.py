from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jdcore.autojac import backward, jac
from tests.core.autojac.conftest import row_by_row

_UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    torch.tanh,
    lambda x: x.square() * 0.5,
    lambda x: x.flip(0),
    lambda x: x.sum().expand(3),
    lambda x: x.cumsum(0),
    lambda x: x[[0, 0, 2]],
    lambda x: x.detach(),
    lambda x: x.outer(x).mean(dim=0),
]
_BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.mul,
    lambda x, y: x + 2 * y.roll(1),
    lambda x, y: torch.cat([x[:2], y[2:]]),
    lambda x, y: torch.where(x > y, x, y),
]

Step = tuple[int, int, int]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    """Steps (operation, first operand, second operand) over growing values, and the outputs."""
    steps: list[Step] = []
    values = 3
    for _ in range(draw(st.integers(1, 7))):
        operation = draw(st.integers(0, len(_UNARY) + len(_BINARY) - 1))
        steps.append((operation, *(draw(st.integers(0, values - 1)) for _ in range(2))))
        values += 1
    outputs = draw(st.lists(st.integers(0, values - 1), min_size=1, max_size=3, unique=True))
    return steps, outputs


def _run(leaves: list[Tensor], steps: list[Step]) -> list[Tensor]:
    values = list(leaves)
    for operation, first, second in steps:
        if operation < len(_UNARY):
            values.append(_UNARY[operation](values[first]))
        else:
            values.append(_BINARY[operation - len(_UNARY)](values[first], values[second]))
    return values


@settings(max_examples=80, deadline=None)
@given(programs(), st.sampled_from([None, 1, 2, 4, 50]), st.booleans(), st.integers(0, 2**31))
def test_the_jacobian_of_any_graph_is_that_of_plain_autograd(
    program: tuple[list[Step], list[int]], chunk_size: int | None, split: bool, seed: int
) -> None:
    steps, chosen = program
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    values = _run(leaves, steps)
    outputs = [values[i] for i in chosen]
    if split:
        outputs = [element for output in outputs for element in output.unbind()]
    if not any(output.requires_grad for output in outputs):
        return
    expected = row_by_row(outputs, leaves)

    results = jac(outputs, leaves, retain_graph=True, parallel_chunk_size=chunk_size)
    backward(outputs, parallel_chunk_size=chunk_size)

    for leaf, result, jacobian in zip(leaves, results, expected, strict=True):
        torch.testing.assert_close(result, jacobian, rtol=1e-12, atol=1e-12)
        if hasattr(leaf, "jac"):
            torch.testing.assert_close(leaf.jac, jacobian, rtol=1e-12, atol=1e-12)
        else:
            assert jacobian.eq(0).all()
