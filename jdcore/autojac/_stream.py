from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from jdcore.autojac._gradients import as_matrix
from jdcore.autojac._problem import Problem
from jdcore.autojac._products import find_products
from jdcore.autojac._taps import hooked, listening, placeholder
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
    heard: set[int] = set()

    def consume(rows: Tensor) -> None:
        total.add_(gramian(as_matrix(rows)))

    def multiply(i: int, gradients: Tensor) -> None:
        total.add_(problem.products[i].gramian(gradients))
        heard.add(i)

    leaves = [leaf for i, leaf in enumerate(problem.inputs) if i not in problem.products]
    listeners = {i: partial(_listen, partial(multiply, i)) for i in problem.products}
    with (
        hooked(leaves, [lambda rows: _tap(rows, consume)] * len(leaves)),
        listening(problem.products, listeners),
    ):
        found = batched_gradients(problem.outputs, problem.ends, problem.cotangents, True)
    for i in problem.products:
        gradients = found[i]
        if i not in heard and gradients is not None:
            multiply(i, gradients)
    return total


def _listen(consume: Sink, gradients: Tensor) -> None:
    _tap(gradients, consume)


def _tap(rows: Tensor, consume: Sink) -> Tensor:
    apply: Callable[[Tensor, Sink], Tensor] = _Tap.apply
    return apply(rows, consume)


def grouped_gramian(problem: Problem) -> Tensor:
    """
    Gramian of the Jacobian, row by row, for groups of inputs that are as large as the largest.

    Each group takes its own passes, no deeper into the graph than its inputs are. The graph is
    retained.

    :returns: float64 Tensor [m, m].
    """
    total = _zeros(problem)
    for group in _groups(problem):
        part = problem.restricted(group)
        rows = part.solve(1, retain_graph=True)
        direct = [as_matrix(block) for i, block in enumerate(rows) if i not in part.products]
        if direct:
            total.add_(gramian(direct))
        for i, product in part.products.items():
            total.add_(product.gramian(rows[i]))
    return total


def cheap_products(problem: Problem) -> Problem:
    """The same problem, with those products of which the gradients suffice for a Gramian."""
    m = len(problem.cotangents[0])
    if problem.accumulates:
        return problem
    found = find_products(problem.graph, dict(enumerate(problem.inputs)), certain=False)
    products = {
        i: evolve(product, multiply=False)
        for i, product in found.items()
        if product.has_cheap_gramian(problem.inputs[i], m)
    }
    return evolve(problem, products=products)


def _groups(problem: Problem) -> list[list[int]]:
    limit = max(tensor.numel() for tensor in problem.inputs)
    groups: list[list[int]] = [[]]
    total = 0
    for i, size in enumerate(map(math.prod, problem.row_shapes)):
        if total + size > limit and groups[-1]:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
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
