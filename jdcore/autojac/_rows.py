from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from attrs import evolve, frozen
from torch import Tensor

from jdcore.autojac._leaves import Reach, reach
from jdcore.autojac._matrix import as_matrix
from jdcore.autojac._policy import choose_chunk_size
from jdcore.autojac._reentrant import accumulated_gradients, is_reentrant
from jdcore.autojac._taps import RowTaps
from jdcore.autojac._vmap import Kind, attempt, batched_gradients, insist


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
    problem = Problem.of(outputs, inputs, cotangents)
    if chunk_size == 1 or len(cotangents[0]) == 1:
        return problem.solve(1, retain_graph)
    kind = Kind.of(problem.graph)
    if chunk_size is not None:
        return insist(kind, partial(problem.solve, chunk_size), retain_graph)
    chosen = choose_chunk_size(kind, inputs, problem.usage)
    one_by_one = partial(problem.solve, 1, retain_graph)
    if chosen == 1:
        return one_by_one()
    return attempt(kind, partial(problem.solve, chosen), retain_graph, one_by_one)


@frozen(eq=False)
class Problem:
    """
    Rows to be differentiated.

    :param outputs: Tensors to differentiate, all of which require grad.
    :param inputs: Tensors that require grad.
    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output.
    :param graph: What lies behind the outputs.
    :param reentrant: Whether a reentrant checkpoint is among it.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    graph: Reach
    reentrant: bool

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

    def restricted(self, inputs: Sequence[Tensor]) -> Problem:
        """The same rows for some of the inputs."""
        return evolve(self, inputs=list(inputs))

    @property
    def usage(self) -> list[list[bool]]:
        """
        For each row, which outputs it differentiates.

        An output whose part of the row is zero is left out: passing zeros through its graph costs
        time, and gives NaN wherever that graph has an infinite derivative.
        """
        masks = [(as_matrix(c) != 0).any(dim=1) for c in self.cotangents]
        return torch.stack(masks, dim=1).tolist()

    def solve(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        """Differentiate ``chunk_size`` rows at a time, freeing the graph with the last of them."""
        with _same_grad([*self.outputs, *self.inputs]):
            if chunk_size >= len(self.cotangents[0]) > 1:
                return self._at_once(retain_graph)
            return self._in_chunks(chunk_size, retain_graph)

    def _at_once(self, retain_graph: bool) -> list[Tensor]:
        gradients = batched_gradients(self.outputs, self.inputs, self.cotangents, retain_graph)
        return _disjoint(gradients, self.cotangents)

    def _in_chunks(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        usage = self.usage
        m = len(usage)
        results = [_empty(m, tensor) for tensor in self.inputs]
        zeros: list[list[int]] = [[] for _ in results]
        starts = range(0, m, chunk_size)
        last = max((s for s in starts if any(map(any, usage[s : s + chunk_size]))), default=-1)
        taps = RowTaps(self.inputs, results)
        with taps.open() if chunk_size == 1 and not self.reentrant else nullcontext():
            for start in starts:
                rows = slice(start, min(start + chunk_size, m))
                used = [k for k in range(len(self.outputs)) if any(u[k] for u in usage[rows])]
                taps.start(start)
                gradients = self._gradients(rows, used, retain_graph or start != last)
                for i in reversed(range(len(results))):
                    # Popping frees each gradient as soon as it is copied.
                    gradient = gradients.pop()
                    if gradient is None:
                        zeros[i].extend(range(rows.start, rows.stop))
                    elif i not in taps.taken:
                        results[i][rows] = _dense(gradient)
        for result, indices in zip(results, zeros, strict=True):
            if indices:
                result[indices] = 0.0
        return results

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
                outputs, self.inputs, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        )


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _empty(m: int, tensor: Tensor) -> Tensor:
    return torch.empty((m, *tensor.shape), dtype=tensor.dtype, device=tensor.device)


def _disjoint(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Copy those gradients that share memory: with one another (as for a + b), or with others."""
    seen = {other.untyped_storage().data_ptr() for other in others}
    results = []
    for gradient in gradients:
        dense = _dense(gradient)
        storage = dense.untyped_storage()
        whole = dense.is_contiguous() and storage.nbytes() == dense.numel() * dense.itemsize
        if not whole or storage.data_ptr() in seen:
            dense = dense.clone(memory_format=torch.contiguous_format)
        seen.add(dense.untyped_storage().data_ptr())
        results.append(dense)
    return results


@contextmanager
def _same_grad(tensors: Sequence[Tensor]) -> Iterator[None]:
    """
    Put back the ``.grad`` of tensors that retain it.

    Differentiating writes it as a side effect: sums over the rows, to which an aggregated gradient
    must not be added, or under vmap a tensor that cannot be used outside.
    """
    before = [(t, t.grad) for t in tensors if not t.is_leaf and t.retains_grad]
    try:
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
