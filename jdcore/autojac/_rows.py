from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge

from jdcore._fields import dense, disjoint
from jdcore.autojac._gradients import same_grad, zeros
from jdcore.autojac._matrix import as_matrix
from jdcore.autojac._policy import choose_chunk_size
from jdcore.autojac._products import Product, find_products
from jdcore.autojac._reentrant import accumulated_gradients, is_reentrant
from jdcore.autojac._taps import RowTaps
from jdcore.autojac._vmap import Kind, attempt, batched_gradients, insist
from jdcore.graph import Reach, reach
from jdcore.linalg._pages import new_tensor


def jacobians(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """
    Multiply initial Jacobians by the Jacobian of the outputs with respect to the inputs.

    :param outputs: Tensors to differentiate; those that do not require grad contribute nothing.
    :param inputs: Tensors that require grad.
    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param chunk_size: Rows differentiated at once, by vmap if more than 1. None lets the library
        choose; it then falls back to single rows where vmap fails.
    :returns: One new contiguous tensor ``[m, *S_input]`` per input, sharing memory with no other.
    :raises VectorizationError: If vmap fails with the chunk size asked for.
    """
    return Problem.of(outputs, inputs, cotangents).jacobians(retain_graph, chunk_size)


@frozen(eq=False)
class Problem:
    """
    Rows to be differentiated.

    :param outputs: Tensors to differentiate, all of which require grad.
    :param inputs: Tensors that require grad.
    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output.
    :param graph: What lies behind the outputs.
    :param reentrant: Whether a reentrant checkpoint is among it.
    :param products: Inputs, by position, whose rows are computed as products. Only taken into
        account where rows are differentiated one by one.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    graph: Reach
    reentrant: bool
    products: Mapping[int, Product] = field(factory=dict)

    @staticmethod
    def of(
        outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Problem:
        """The rows of those outputs that require grad."""
        live = [k for k, output in enumerate(outputs) if output.requires_grad]
        differentiated = [outputs[k] for k in live]
        rows = [cotangents[k] for k in live]
        graph = reach(differentiated)
        return Problem(differentiated, list(inputs), rows, graph, is_reentrant(graph))

    def restricted(self, positions: Sequence[int]) -> Problem:
        """The same rows for some of the inputs."""
        products = {p: self.products[i] for p, i in enumerate(positions) if i in self.products}
        return evolve(self, inputs=[self.inputs[i] for i in positions], products=products)

    def with_products(self) -> Problem:
        """The same problem, knowing which inputs are factors of matrix products."""
        if self.reentrant:
            return self
        return evolve(self, products=find_products(self.graph, self.outputs, self.inputs))

    @property
    def usage(self) -> list[list[bool]]:
        """
        For each row, which outputs it differentiates.

        An output whose part of the row is zero is left out: passing zeros through its graph costs
        time, and gives NaN wherever that graph has an infinite derivative.
        """
        if all(c.ndim == 1 for c in self.cotangents):
            masks = [c != 0 for c in self.cotangents]
        else:
            masks = [(as_matrix(c) != 0).any(dim=1) for c in self.cotangents]
        usage: list[list[bool]] = torch.stack(masks, dim=1).tolist()
        return usage

    def row_by_row(self, retain_graph: bool) -> list[Tensor]:
        """Differentiate without vmap, freeing the graph with the last row."""
        return self.with_products().solve(1, retain_graph)

    def jacobians(self, retain_graph: bool, chunk_size: int | None = None) -> list[Tensor]:
        """The Jacobians of the inputs; see :func:`jacobians`."""
        if chunk_size == 1 or len(self.cotangents[0]) == 1:
            return self.row_by_row(retain_graph)
        kind = Kind.of(self.graph)
        if chunk_size is not None:
            return insist(kind, partial(self.solve, chunk_size), retain_graph)
        chosen = choose_chunk_size(kind, self.inputs, self.usage)
        one_by_one = partial(self.row_by_row, retain_graph)
        if chosen == 1:
            return one_by_one()
        return attempt(kind, partial(self.solve, chosen), retain_graph, one_by_one)

    def solve(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        """Differentiate ``chunk_size`` rows at a time, freeing the graph with the last of them."""
        with same_grad([*self.outputs, *self.inputs]):
            if chunk_size >= len(self.cotangents[0]) > 1:
                return self._at_once(retain_graph)
            return self._in_chunks(chunk_size, retain_graph)

    def _at_once(self, retain_graph: bool) -> list[Tensor]:
        gradients = batched_gradients(self.outputs, self.inputs, self.cotangents, retain_graph)
        m = len(self.cotangents[0])
        pairs = zip(gradients, self.inputs, strict=True)
        return disjoint([zeros(t, m) if g is None else dense(g) for g, t in pairs], self.cotangents)

    def _in_chunks(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        usage = self.usage
        m = len(usage)
        pairs = zip(self.inputs, self.row_shapes, strict=True)
        results = [new_tensor(tensor, m, *shape) for tensor, shape in pairs]
        filled: list[list[bool]] = []
        starts = range(0, m, chunk_size)
        last = max((s for s in starts if any(map(any, usage[s : s + chunk_size]))), default=-1)
        taps = RowTaps(self.inputs, results, self.products)
        with taps.open() if chunk_size == 1 and not self.reentrant else nullcontext():
            for start in starts:
                rows = slice(start, min(start + chunk_size, m))
                used = [k for k, uses in enumerate(zip(*usage[rows], strict=True)) if any(uses)]
                taps.start(start)
                gradients = self._gradients(rows, used, retain_graph or start != last)
                filled += [self._fill(results, rows, gradients, taps.taken)] * (
                    rows.stop - rows.start
                )
        _clear(results, filled)
        return results

    def _fill(
        self,
        results: list[Tensor],
        rows: slice,
        gradients: list[Tensor | None],
        taken: set[int],
    ) -> list[bool]:
        """
        Write those gradients to their rows that have not been taken on their way.

        :returns: For each input, whether the rows are written.
        """
        filled = [i in taken or gradient is not None for i, gradient in enumerate(gradients)]
        for i in reversed(range(len(gradients))):
            # Popping frees each gradient as soon as it is copied.
            gradient = gradients.pop()
            if i in taken or gradient is None:
                continue
            if i in self.products:
                self.products[i].write_row(results[i][rows.start], gradient)
            else:
                results[i][rows] = dense(gradient)
        return filled

    def _gradients(self, rows: slice, used: list[int], retain_graph: bool) -> list[Tensor | None]:
        if not used:
            return [None] * len(self.inputs)
        outputs = [self.outputs[k] for k in used]
        cotangents = [self.cotangents[k][rows] for k in used]
        if len(cotangents[0]) > 1:
            return [*batched_gradients(outputs, self.inputs, cotangents, retain_graph)]
        row = [cotangent[0] for cotangent in cotangents]
        return self._single_row(outputs, row, retain_graph)

    def _single_row(
        self, outputs: list[Tensor], cotangents: list[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        if self.reentrant:
            leaves = self.graph.leaves
            return accumulated_gradients(leaves, outputs, self.inputs, cotangents, retain_graph)
        return list(
            torch.autograd.grad(
                outputs, self.ends, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        )

    @property
    def row_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the rows of the inputs."""
        products = self.products
        return [
            products[i].row_shape(tensor) if i in products else tuple(tensor.shape)
            for i, tensor in enumerate(self.inputs)
        ]

    @property
    def ends(self) -> list[Tensor] | list[GradientEdge]:
        """Where differentiation ends: the inputs, or the products that they are factors of."""
        products = self.products
        ends = [products[i].edge if i in products else t for i, t in enumerate(self.inputs)]
        return cast("list[Tensor]", ends)  # torch takes mixed lists, its annotations do not


def _clear(results: list[Tensor], filled: list[list[bool]]) -> None:
    """Set to zero the rows that nothing was written to."""
    for result, rows in zip(results, zip(*filled, strict=True), strict=True):
        missing = [k for k, written in enumerate(rows) if not written]
        if missing:
            result[missing] = 0.0
