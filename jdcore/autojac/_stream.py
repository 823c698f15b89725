from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jdcore.autojac._matrix import as_matrix
from jdcore.autojac._rows import Problem
from jdcore.autojac._taps import hooked, placeholder
from jdcore.autojac._vmap import batched_gradients
from jdcore.linalg import gramian

Sink = Callable[[Tensor], None]


def streamed_gramian(problem: Problem) -> Tensor:
    """
    Gramian of the Jacobian, all rows differentiated at once, in one pass under vmap.

    The rows of each leaf are turned into their share of the Gramian and freed as soon as they are
    known, while the pass goes on. The graph is retained.

    :param problem: Its inputs must be leaves.
    :returns: float64 Tensor [m, m].
    """
    total = _zeros(problem)

    def consume(rows: Tensor) -> None:
        total.add_(gramian(as_matrix(rows)))

    tap: Callable[[Tensor, Sink], Tensor] = _Tap.apply
    with hooked(problem.inputs, [lambda rows: tap(rows, consume)] * len(problem.inputs)):
        batched_gradients(problem.outputs, problem.inputs, problem.cotangents, True)
    return total


def grouped_gramian(problem: Problem) -> Tensor:
    """
    Gramian of the Jacobian, row by row, for groups of inputs that are as large as the largest.

    Each group takes its own passes, no deeper into the graph than its inputs are. The graph is
    retained.

    :returns: float64 Tensor [m, m].
    """
    total = _zeros(problem)
    for group in _groups(problem.inputs):
        rows = problem.restricted(group).solve(1, retain_graph=True)
        total.add_(gramian([as_matrix(block) for block in rows]))
    return total


def _groups(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    limit = max(tensor.numel() for tensor in inputs)
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in inputs:
        if size + tensor.numel() > limit and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel()
    return groups


def _zeros(problem: Problem) -> Tensor:
    m = len(problem.cotangents[0])
    return torch.zeros((m, m), dtype=torch.float64, device=problem.inputs[0].device)


class _Tap(torch.autograd.Function):
    """The way to the tensor behind a batched one that needs no private function."""

    @staticmethod
    def forward(rows: Tensor, consume: Sink) -> Tensor:
        raise RuntimeError("vmap treats the gradient of a leaf as a single row")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], rows: Tensor, consume: Sink
    ) -> tuple[Tensor, int | None]:
        batched = in_dims[0]
        assert batched is not None
        consume(rows.movedim(batched, 0))
        return placeholder(rows), batched
