from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Truth = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def _loop(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in inputs]
    for output in outputs:
        for element in output.flatten():
            gradients = torch.autograd.grad(
                element, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for row, gradient in zip(rows, gradients, strict=True):
                row.append(gradient)
    return [torch.stack(row) for row in rows]


@pytest.fixture
def truth() -> Truth:
    """The Jacobians, row by row, by plain autograd; the graph is kept."""
    return _loop


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
