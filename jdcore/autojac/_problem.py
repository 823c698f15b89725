from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain, compress
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from jdcore._fields import check_fits, dense, disjoint
from jdcore.autojac._gradients import as_matrix, same_grad, zeros
from jdcore.autojac._hidden import AccumulatedRows, guarded, hides
from jdcore.autojac._products import Product, find_products
from jdcore.autojac._rows import Rows
from jdcore.autojac._taps import RowTaps, worth_a_hook
from jdcore.autojac._vmap import Kind, attempt, choose_chunk_size, insist, seems_hooked
from jdcore.errors import VectorizationError
from jdcore.graph import Reach, reach
from jdcore.graph._batched import agree, batched_gradients, mixed, without_warning
from jdcore.graph._functions import kept_leaves, returning_copies
from jdcore.graph._hooks import hooks_made_lately
from jdcore.graph._passes import differentiate, explain_single_pass
from jdcore.graph._retained import retained_in
from jdcore.graph._saved import function_of_others

Gradients = Sequence["Tensor | None"]
Pass = Callable[[int, Sequence[int], bool], Gradients]


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Problem:
    """
    Rows to be differentiated.

    :param outputs: Tensors to differentiate, all of which require grad.
    :param inputs: Tensors that require grad.
    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output; or initial gradients
        ``[*S_output]``, see ``apart``.
    :param graph: What lies behind the outputs.
    :param watched: Leaves that functions of the graph may accumulate into by themselves.
    :param uses: For each row, the positions of the outputs it differentiates, where that is known.
    :param sums: How many of the inputs, the last ones, get the sum over the rows in place of a row
        each. Such rows are differentiated one by one.
    :param asked: For each row, the positions of the inputs that it is wanted of. By default all.
    :param retained: For each row, whether later ones need the graph that its pass goes through. By
        default, all of them go through the same one.
    :param apart: Whether each output belongs to one row alone, so that it has a gradient in place
        of a Jacobian. Such rows are differentiated one by one, and known by their ``uses``.
    :param products: Inputs, by position, whose rows are computed as products. Only taken into
        account where rows are differentiated one by one.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    graph: Reach
    watched: list[Tensor]
    uses: Sequence[Sequence[int]] | None = None
    sums: int = 0
    asked: Sequence[Sequence[int]] | None = None
    retained: Sequence[bool] | None = None
    apart: bool = False
    products: Mapping[int, Product] = field(factory=dict)

    @staticmethod
    def of(
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        graph: Reach | None = None,
        watched: Iterable[Tensor] = (),
        uses: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Problem:
        """
        The rows of those outputs that require grad.

        :param graph: What lies behind the outputs, if it is known.
        :param watched: Tensors among which are leaves whose ``.grad`` must not change, besides
            those that the graph shows.
        :param uses: For each row, the positions among all the outputs of those that it
            differentiates, if that is known.
        :param options: Further fields.
        """
        # autograd refuses outputs without a graph; the loss of an absent task has none, and its row
        # is zero.
        live = [output.requires_grad for output in outputs]
        differentiated = list(compress(outputs, live))
        rows = list(compress(cotangents, live))
        found = reach(differentiated) if graph is None else graph
        aside = kept_leaves(found.functions)
        aside += [tensor for tensor in watched if tensor.requires_grad and tensor.is_leaf]
        if uses is not None and len(rows) < len(live):
            places = {old: new for new, old in enumerate(compress(range(len(live)), live))}
            uses = [[places[i] for i in row if i in places] for row in uses]
        return Problem(differentiated, list(inputs), rows, found, aside, uses, **options)

    @property
    def m(self) -> int:
        """Number of rows."""
        return self.cotangents[0].shape[0] if self.uses is None else len(self.uses)

    @property
    def with_rows(self) -> list[Tensor]:
        """The inputs that get a row each."""
        return self.inputs[: len(self.inputs) - self.sums]

    @cached_property
    def kind(self) -> Kind:
        """What vmap can know of the graph."""
        return Kind.of(self.graph)

    @cached_property
    def accumulates(self) -> bool:
        """Whether rows must be accumulated, see :func:`hides`."""
        return hides(self.graph, self.inputs)

    def with_products(self) -> Problem:
        """The same problem, knowing which large inputs are factors of matrix products."""
        large = worth_a_hook(self.with_rows)
        # A function that accumulates by itself may add to the gradient of a weight, besides what
        # its product gives.
        if self.accumulates or not large:
            return self
        return evolve(self, products=find_products(self.graph, large))

    @cached_property
    def usage(self) -> Sequence[Sequence[int]]:
        """
        For each row, the positions of the outputs it differentiates.

        An output whose part of the row is zero is left out: passing zeros through its graph costs
        time, and gives NaN wherever that graph has an infinite derivative.
        """
        if self.uses is not None:
            return self.uses
        matrices = list(map(as_matrix, self.cotangents))
        if all(matrix.is_cpu for matrix in matrices):
            used = list(map(_rows_not_zero, matrices))
        else:
            masks = [matrix.any(dim=1) for matrix in matrices]
            # One transfer for all rows, as each one would wait for an accelerator.
            used = (masks[0][None] if len(masks) == 1 else torch.stack(masks)).tolist()
        numbers = range(len(matrices))
        return [[*compress(numbers, row)] for row in zip(*used, strict=True)]

    def jacobians(self, retain_graph: bool, chunk_size: int | None = None) -> list[Tensor]:
        """
        Multiply the initial Jacobians by the Jacobian of the outputs with respect to the inputs.

        :param retain_graph: Whether the graph can be differentiated again afterwards.
        :param chunk_size: Rows differentiated at once, by vmap if more than 1. None lets the
            library choose; it then falls back to single rows where vmap fails.
        :returns: One new contiguous tensor ``[m, *S_input]`` per input, sharing memory with no
            other.
        :raises VectorizationError: If vmap fails with the chunk size asked for.
        """
        if chunk_size == 1 or self.m == 1:
            return self.row_by_row(retain_graph)
        # vmap would leave the gradient of all rows there, batched and of use to nobody.
        retains = retained_in(self.graph, but=[*self.outputs, *self.inputs])
        if chunk_size is not None:
            if retains:
                raise VectorizationError(
                    "a tensor in the graph retains its gradient (retain_grad)."
                )
            solve, doubt = partial(self.solve, chunk_size), hooks_made_lately(self.graph.nodes)
            retaining = partial(self.row_by_row, True)
            return insist(self.kind, solve, retain_graph, retaining, self.agrees_with, doubt=doubt)
        one_by_one = partial(self.row_by_row, retain_graph)
        chosen = 1 if retains or self.accumulates else self._chunk_size()
        if chosen == 1 or seems_hooked(self.kind, self.graph):
            return one_by_one()
        solve = partial(self._solve_in_memory, chosen)
        return attempt(self.kind, solve, retain_graph, one_by_one, self.agrees_with)

    def _chunk_size(self) -> int:
        known = self.uses is not None

        def use_all() -> bool:
            return all(len(row) == len(self.outputs) for row in self.usage)

        return choose_chunk_size(self.kind, self.inputs, self.m, use_all, self.graph, known=known)

    def row_by_row(self, retain_graph: bool) -> list[Tensor]:
        """Differentiate without vmap, freeing the graph with the last row."""
        # Accelerators copy whole rows at once: there, each hook costs more than it saves.
        on_cpu = all(tensor.is_cpu for tensor in self.inputs)
        return (self.with_products() if on_cpu else self).solve(1, retain_graph)

    def solve(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        """Differentiate ``chunk_size`` rows at a time, freeing the graph with the last of them."""
        # In this order: the fields that passes write as a side effect are put back also where the
        # passes are refused.
        with same_grad([*self.outputs, *self.inputs]), self._checked():
            size = min(chunk_size, self.m)
            if size > 1 and self.accumulates:
                raise VectorizationError(
                    "the graph holds functions or hooks for which each row must be accumulated."
                )
            if size == 1:
                return self._in_pieces(size, retain_graph)
            with without_warning(self.kind.operations):
                whole = size == self.m
                return self._at_once(retain_graph) if whole else self._in_pieces(size, retain_graph)

    def _solve_in_memory(self, chunk_size: int, retain_graph: bool) -> list[Tensor]:
        """:meth:`solve`, with less rows at a time where memory does not suffice."""
        while chunk_size > 1:
            try:
                return self.solve(chunk_size, retain_graph)
            except torch.OutOfMemoryError:
                if not retain_graph:
                    raise  # parts of the graph are gone
            chunk_size //= 2
        return self.row_by_row(retain_graph)

    def agrees_with(self, rows: Sequence[Tensor], retain_graph: bool) -> bool:
        """Whether rows are those of single passes, told by one pass for a combination of them."""
        seeds = [mixed(cotangent) for cotangent in self.cotangents]
        with same_grad([*self.outputs, *self.inputs]), self._checked():
            found = differentiate(self.outputs, self.inputs, seeds, retain_graph)
        single = [
            torch.zeros_like(t) if g is None else dense(g)
            for g, t in zip(found, self.inputs, strict=True)
        ]
        return agree(zip(rows, single, strict=True))

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Refuse what would make rows incomplete, and explain what torch refuses."""
        try:
            if self.accumulates:  # the rows are taken from there
                yield
            else:
                with guarded(self._leaves(), custom=bool(self.graph.functions)):
                    yield
        except RuntimeError as error:
            explain_single_pass(error)
            raise

    def _leaves(self) -> list[Tensor]:
        given = [tensor for tensor in self.inputs if tensor.is_leaf]
        # Inputs that the outputs do not depend on are watched as well: a hidden use of them is what
        # makes a row incomplete.
        leaves = [*self.graph.leaves, *self.watched, *given]
        return list({id(leaf): leaf for leaf in leaves}.values())

    def _at_once(self, retain_graph: bool) -> list[Tensor]:
        gradients = batched_gradients(self.outputs, self.inputs, self.cotangents, retain_graph)
        pairs = list(zip(gradients, self.inputs, strict=True))
        for gradient, tensor in pairs:
            if gradient is not None:
                check_fits(gradient.shape[1:], tensor)
        # A leaf may ask for gradients of another dtype (`grad_dtype`); its rows have its own.
        rows = [zeros(t, self.m) if g is None else dense(g).to(t.dtype) for g, t in pairs]
        # An input that is an output itself gets the initial Jacobian as its own.
        return disjoint(rows, self.cotangents)

    def _in_pieces(self, size: int, retain_graph: bool) -> list[Tensor]:
        """Differentiate so many rows at a time and write them to their places."""
        used, every = self.usage, range(len(self.inputs))
        if size > 1:
            pieces = [used[start : start + size] for start in range(0, self.m, size)]
            used = [sorted({*chain.from_iterable(piece)}) for piece in pieces]
        asked = self.asked or [every] * len(used)
        # Rows that use no output make no pass: the graph is freed by the last one that does.
        passes = [k for k, outputs in enumerate(used) if outputs and asked[k]]
        rows = Rows(self.inputs, self.sums, self.m, size, self.products)
        taps = RowTaps(self.with_rows if size == 1 else [], self.products, rows)
        with self._passes(taps, size) as gradients_of:
            for k in passes:
                retain = k != passes[-1] if self.retained is None else self.retained[k]
                taps.start(k)
                gradients = gradients_of(k, used[k], retain_graph or retain)
                rows.write(k, asked[k], gradients, taps.taken)
        return rows.finished()

    @contextmanager
    def _passes(self, taps: RowTaps, size: int) -> Iterator[Pass]:
        """How the gradients of so many rows are had, by their place and the outputs they use."""
        accumulated = AccumulatedRows(self.inputs) if self.accumulates else None
        products = self.products
        # Torch takes mixed lists, its annotations do not.
        ends: Any = [products[i].edge if i in products else t for i, t in enumerate(self.inputs)]

        def gradients_of(k: int, used: Sequence[int], retain_graph: bool) -> Gradients:
            outputs = [self.outputs[i] for i in used]
            if size > 1:
                rows = [self.cotangents[i][k * size : (k + 1) * size] for i in used]
                return batched_gradients(outputs, self.inputs, rows, retain_graph)
            cotangents = [self.cotangents[i] for i in used]
            if not self.apart:
                cotangents = [cotangent[k] for cotangent in cotangents]
            if accumulated is not None:
                found = accumulated.row(outputs, cotangents, retain_graph)
                return found if self.asked is None else [found[i] for i in self.asked[k]]
            wanted = ends if self.asked is None else [ends[i] for i in self.asked[k]]
            return differentiate(outputs, wanted, cotangents, retain_graph)

        if accumulated is not None:
            with accumulated.open(self.outputs, self._leaves()):
                yield gradients_of
        else:
            # Those of compiled regions return other memory each time that they run in one pass, and
            # each row is copied before the next pass.
            functions = list(filter(function_of_others, self.graph.functions))
            with returning_copies(functions), taps.open(self.outputs):
                yield gradients_of


def _rows_not_zero(matrix: Tensor) -> list[bool]:
    """Which rows of a matrix on the host are not zero."""
    # Most often the first entry of each tells, for a fraction of the time.
    if matrix.shape[1] and all(matrix[:, 0].tolist()):
        return [True] * len(matrix)
    found: list[bool] = matrix.any(dim=1).tolist()
    return found
