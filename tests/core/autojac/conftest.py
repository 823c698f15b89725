from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Truth = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def row_by_row(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in inputs]
    for output in outputs:
        for element in output.flatten():
            gradients = _gradients(element, inputs)
            for row, gradient in zip(rows, gradients, strict=True):
                row.append(gradient)
    return [torch.stack(row) for row in rows]


def _gradients(element: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    if not element.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(
        element, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.fixture
def truth() -> Truth:
    """The Jacobians, row by row, by plain autograd; the graph is kept."""
    return row_by_row


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
