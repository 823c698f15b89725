"""
Gradients of losses without samples, each of which has its own way through the graph.

Where all losses pass through an operation (in the trunk of a network, or anywhere), their gradients
may do so together, in one batched pass. What only some pass through (their heads) is left to a pass
for each loss, which ends where the trunk begins and meets no head of another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import TypeAlias

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge

from jdcore.graph._batched import batched_gradients, without_warning
from jdcore.graph._cost import batch_beats_single_passes
from jdcore.graph._graph import Form, Graph, Place, once_for_each_form
from jdcore.graph._memory import Memory, pieces
from jdcore.graph._objectives import Objectives, OneByOne
from jdcore.graph._operations import having, is_batchable, is_listed
from jdcore.graph._passes import copies, detached, differentiate, stacked
from jdcore.linalg._combine import sent

_Kind: TypeAlias = "frozenset[tuple[str, tuple[torch.dtype, ...]]]"

# Operations, by their names and dtypes, that a batched pass went through, or failed in.
_PASSED: set[_Kind] = set()
_FAILED: set[_Kind] = set()

# Operations that do nothing but put losses into a row.
_JOINS = having("join")


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Starts:
    """
    Where the gradients of losses without samples start.

    :param graph: The graph.
    :param places: By loss, the result that it is an entry of; None for a loss without a graph.
    :param entries: By loss, which entry.
    :param device: Where the losses are.
    """

    graph: Graph
    places: Sequence[Place | None]
    entries: Sequence[int]
    device: torch.device

    @cached_property
    def alone(self) -> Mapping[int, int]:
        """The operations and leaves that one of several losses reaches, and this loss."""
        return _ways(self.graph.form, tuple(self.places)).alone

    def seeds(self, place: Place, losses: Sequence[int]) -> Tensor:
        """What some losses start with at a place: one at their entry, else zero."""
        result = self.graph.form.result(place)
        length = result.shape.numel()
        if len(losses) == length == 1:
            return torch.ones(1, *result.shape, dtype=result.dtype, device=self.device)
        seeds = torch.zeros(len(losses), length, dtype=result.dtype, device=self.device)
        here = [(i, self.entries[k]) for i, k in enumerate(losses) if self.places[k] == place]
        if len(losses) == 1:
            seeds[0].narrow(0, here[0][1], 1).fill_(1)  # an assignment would wait for a device
        elif here == [(i, i) for i in range(seeds.shape[1])]:
            seeds.fill_diagonal_(1)
        elif here:
            rows, entries = sent(torch.tensor(here, device="cpu"), self.device).T
            seeds[rows, entries] = 1
        return seeds.view(len(losses), *result.shape)


def starts_of(graph: Graph, objectives: Objectives) -> Starts:
    """
    Where each of the losses starts, all of which count as tasks.

    A loss that was put into a row with others starts where it was computed, unless the row itself
    may have a hook.
    """
    found: list[tuple[Place | None, int]] = []
    entries = _at_row if isinstance(objectives, OneByOne) else _entries
    places = iter(graph.form.starts)
    for output in objectives.outputs:
        if output.requires_grad:
            found += entries(graph, next(places))
        else:
            found += [(None, i) for i in range(output.numel())]
    if objectives.batch_dim is not None:
        # The losses come in the order of their tensor; tasks are in the order [K, B].
        order = torch.arange(len(found), device="cpu")
        found = [found[i] for i in objectives.by_task(order).flatten().tolist()]
    device = objectives.outputs[0].device
    return Starts(graph, [place for place, _ in found], [entry for _, entry in found], device)


def _entries(graph: Graph, place: Place) -> list[tuple[Place | None, int]]:
    """Where the losses at a place were computed, before they were put into a row."""
    found: list[tuple[Place | None, int]] = []
    stack = [place]  # no recursion, since a loop may have put in one loss after the other
    while stack:
        place = stack.pop()
        parts = _parts(graph, place)
        if parts:
            stack += reversed(parts)
        else:
            found += _in_vector(graph, place) or _at_row(graph, place)
    return found


def _at_row(graph: Graph, place: Place) -> list[tuple[Place | None, int]]:
    """The losses at a place, as they are."""
    return [(place, i) for i in range(graph.form.result(place).shape.numel())]


def _in_vector(graph: Graph, place: Place) -> list[tuple[Place | None, int]]:
    """The loss at a place as the entry of a vector, if a loop took it out of one."""
    # Torch makes of the gradient of one entry a zero for each other one, whose number would be
    # squared.
    form, (node, number) = graph.form, place
    if form.operations[node] != "Unbind" or place in graph.targets:
        return []
    [vector] = form.inputs[node]
    alone = vector[0] in graph.leaves or vector in graph.targets
    return [] if alone or len(form.result(vector).shape) > 1 else [(vector, number)]


def _parts(graph: Graph, place: Place) -> Sequence[Place]:
    """What a row of losses was put together from, if each part is a place to start at."""
    form, whole = graph.form, graph.form.result(place)
    if form.operations[place[0]] not in _JOINS or len(whole.shape) != 1 or place in graph.targets:
        return ()
    parts = form.inputs[place[0]]
    # What is no operation has no place to start at; another dtype would need a conversion.
    if any(
        part[0] < 0 or part[0] in graph.leaves or form.result(part).dtype != whole.dtype
        for part in parts
    ):
        return ()
    entries = sum(form.result(part).shape.numel() for part in parts)
    return parts if entries == whole.shape.numel() else ()


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Ways:
    """
    Which losses pass through which operations on their way to the wanted tensors.

    :param starts: Where each loss starts; None for one without a graph.
    :param losses: By operation, the losses as bits of a number.
    :param common: The operations that all losses pass through, and behind which only such follow.
    :param kind: Names and dtypes of these.
    :param entrances: Where gradients enter the trunk.
    """

    starts: tuple[Place | None, ...]
    losses: Mapping[int, int]
    common: frozenset[int]
    kind: _Kind
    entrances: Sequence[Place]

    @cached_property
    def met_again(self) -> set[int]:
        """The losses that pass through an operation that a later one passes through as well."""
        # Entries of one result: each loss passes through everything that the others pass through.
        if len(set(self.starts)) == 1:
            return set(range(len(self.starts) - 1))
        # With more than one bit: operations that several losses pass through.
        patterns = {found for found in self.losses.values() if found & (found - 1)}
        again = 0
        for found in patterns:
            # All of them but the last, after which nobody needs what the operation saved.
            again |= found & ~(1 << found.bit_length() - 1)
        return {*_numbers(again)}

    @cached_property
    def alone(self) -> dict[int, int]:
        """The operations that one of several losses passes through, and this loss."""
        several = len(self.starts) > 1
        single = {n: bits for n, bits in self.losses.items() if several and not bits & (bits - 1)}
        return {node: found.bit_length() - 1 for node, found in single.items()}


def _numbers(losses: int) -> Iterator[int]:
    """Losses that are given as bits of a number."""
    while losses:
        lowest = losses & -losses
        yield lowest.bit_length() - 1
        losses ^= lowest


@once_for_each_form
def _asked(
    form: Form, starts: tuple[Place | None, ...], places: tuple[Place, ...]
) -> Sequence[Sequence[Place]]:
    """By loss, those of some places that it may reach: each asked of all would be their square."""
    asked: list[list[Place]] = [[] for _ in starts]
    for place in places:
        for k in _numbers(_ways(form, starts).losses.get(place[0], 0)):
            asked[k].append(place)
    return asked


@once_for_each_form
def _ways(form: Form, starts: tuple[Place | None, ...]) -> Ways:
    """Follow losses, given by where they start, through graphs of a form."""
    at: dict[Place, int] = {}
    for k, start in enumerate(starts):
        if start is not None:
            at[start] = at.get(start, 0) | 1 << k
    everything = sum(1 << k for k, start in enumerate(starts) if start is not None)
    losses: dict[int, int] = {}
    starting = [node for node, _ in at]
    for place, found in at.items():
        losses[place[0]] = losses.get(place[0], 0) | found
    for node in reversed(form.upwards):
        passing = losses.get(node, 0)
        for child in form.inputs[node] if passing else ():
            if child[0] in form.leading:
                losses[child[0]] = losses.get(child[0], 0) | passing
                at[child] = at.get(child, 0) | passing
    # Each result, not only one of several: what a loss does not reach is not zero but nothing.
    partly = {n for (n, _), found in at.items() if found != everything} - form.leaves
    common = _common(form, losses, starting, partly)
    kind = frozenset(
        (form.names[node], tuple([result.dtype for result in form.results[node]]))
        for node in common
    )
    entering = [start for start in starts if start is not None]
    entering += [place for node in losses.keys() - common for place in form.inputs[node]]
    entrances = [place for place in dict.fromkeys(entering) if place[0] in common]
    return Ways(starts, losses, common, kind, entrances)


@once_for_each_form
def _sizes(form: Form, common: frozenset[int], count: int) -> tuple[int, bool] | None:
    """
    The entries of the largest result in a trunk that gradients meet.

    :param count: Of the losses.
    :returns: With it, whether a CPU is faster with all of them at once. None if some operation is
        never batched; nested results, which have no sizes, come from such.
    """
    if not all(is_listed(form.names[node]) for node in common):
        return None
    # What only rearranges parameters is not met by gradients.
    inner = common - form.rearranged
    results = [result.shape.numel() for node in inner for result in form.results[node]]
    leaves = {child for node in common for child, _ in form.inputs[node]} & form.wanted
    weights = [form.result((leaf, 0)).shape.numel() for leaf in leaves]
    return max([1, *results]), batch_beats_single_passes(count, results, weights)


def _common(
    form: Form, losses: Mapping[int, int], starts: Collection[int], partly: Set[int]
) -> frozenset[int]:
    """
    The operations of the trunk.

    :param losses: What passes through which operations.
    :param starts: The operations that losses are results of.
    :param partly: Those that not all losses pass through in the same way.
    """
    inner = [node for node in form.upwards if node in losses and node not in form.leaves]
    found = set(inner) - form.above(partly) - partly
    # The pass of a head ends where it enters the trunk. It must not go on through the trunk to
    # another such place, or to a parameter that both of them use.
    while True:
        heads = [node for node in inner if node not in found]
        met = {child for node in heads for child, _ in form.inputs[node]}
        both = {n for n in found if any(c in met and c in form.wanted for c, _ in form.inputs[n])}
        wrong = found & (form.above((met | set(starts)) & found | both) | both)
        if not wrong:
            return frozenset(found)
        found -= wrong


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Passes:
    """
    The backward passes of tasks: of losses without samples, or each of one loss for every sample.

    :param graph: The graph.
    :param starts: Where each task starts; None for one without a graph.
    :param seeds: Gives the gradients with which some tasks start at a place, one after the other.
    :param memory: How large temporaries may be.
    :param single: Whether each task has to have a pass of its own.
    """

    graph: Graph
    starts: Sequence[Place | None]
    seeds: Callable[[Place, Sequence[int]], Tensor]
    memory: Memory
    single: bool

    def gradients(
        self, places: Sequence[Place], *, retain_graph: bool, alone: Container[Place] = ()
    ) -> list[Tensor | None]:
        """
        The gradients of all losses at some places.

        :param alone: Of these, places that one loss alone reaches, and where its gradient is wanted
            as it is.
        :returns: Else of shape ``[K, *result.shape]`` each, None where no loss arrives.
        """
        if self._at_once == 1:
            return self._one_by_one(places, retain_graph, alone)
        # Nothing is freed before operations of this kind are known to pass.
        known = self._ways.kind in _PASSED
        try:
            return self._batched(places, retain_graph or not known, alone)
        # An operation may refuse to be batched in spite of its name (by a hook, or in a newer
        # torch).
        except RuntimeError:
            if known and not retain_graph:
                raise
        found = self._one_by_one(places, retain_graph, alone)
        _FAILED.add(self._ways.kind)
        return found

    def _one_by_one(
        self, places: Sequence[Place], retain_graph: bool, alone: Container[Place]
    ) -> list[Tensor | None]:
        rows = self._rows(places, retain_graph)
        # Place by place, so that no more than one is in memory twice.
        return [self._stacked(rows.pop(place), place in alone) for place in places]

    def _stacked(self, rows: Mapping[int, Tensor], alone: bool) -> Tensor | None:
        """The gradients of losses at one place, see :meth:`gradients`."""
        if alone:
            return next(map(detached, rows.values()), None)
        return stacked(rows, len(self.starts))

    def _rows(
        self, places: Sequence[Place], retain_graph: bool, but: Container[int] = ()
    ) -> dict[Place, dict[int, Tensor]]:
        """
        By place, the gradients that arrive there, by their losses.

        :param but: The operations whose losses get no pass.
        """
        edges = dict(zip(places, self.graph.edges(places), strict=True))
        rows: dict[Place, dict[int, Tensor]] = {place: {} for place in places}
        asked = _asked(self.graph.form, tuple(self.starts), tuple(places))
        for k, start in enumerate(self.starts):
            if start is None or start[0] in but:
                continue
            found = self._single(k, start, [edges[place] for place in asked[k]], retain_graph)
            for place, grad in zip(asked[k], found, strict=True):
                if grad is not None:
                    rows[place][k] = grad
        return rows

    def _single(
        self, k: int, start: Place, edges: Sequence[GradientEdge], retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of one loss."""
        if not edges:
            return ()
        seed = self.seeds(start, [k])[0]
        retain = retain_graph or k in self._ways.met_again
        found = differentiate(self.graph.edges([start]), edges, [seed], retain)
        return copies(found) if self._reused else found

    @cached_property
    def _reused(self) -> bool:
        """Whether hooks may hand out the same buffer again and again."""
        hooked = [leaf for leaf in self.graph.leaves.values() if leaf._backward_hooks]
        return self.single or bool(hooked)

    @cached_property
    def _ways(self) -> Ways:
        return _ways(self.graph.form, tuple(self.starts))

    # -- all at once -------------------------------------------------------------------------------

    @cached_property
    def _present(self) -> list[int]:
        return [k for k, start in enumerate(self.starts) if start is not None]

    @cached_property
    def _at_once(self) -> int:
        """How many losses go through the trunk together."""
        count, graph, ways = len(self._present), self.graph, self._ways
        if count < 2 or self.single or not ways.common or ways.kind in _FAILED:
            return 1
        if (sizes := _sizes(graph.form, ways.common, count)) is None:
            return 1
        largest, faster = sizes
        # An accelerator is always faster with few large operations.
        if self.memory.cached and not faster:
            return 1
        if not all(is_batchable(graph.form.names[n], graph.nodes[n]) for n in ways.common):
            return 1
        return max(1, min(count, self.memory.gradients // largest))

    def _batched(
        self, places: Sequence[Place], retain_graph: bool, alone: Container[Place]
    ) -> list[Tensor | None]:
        common, graph = self._ways.common, self.graph
        behind = {place for node in common for place in graph.form.inputs[node]}
        of_trunk = [p for p in places if p[0] in common or p in behind]
        of_heads = [p for p in places if p[0] not in common and p not in behind]
        found = self._rows([*of_heads, *self._ways.entrances], retain_graph, common)
        # Taken out, so that those of single losses are gone before those of all go on.
        arriving = {
            place: self._arriving(place, found.pop(place)) for place in self._ways.entrances
        }
        grads = {place: self._stacked(found.pop(place), place in alone) for place in of_heads}
        grads |= self._through_trunk(arriving, of_trunk, retain_graph)
        return [grads[place] for place in places]

    def _arriving(self, place: Place, rows: Mapping[int, Tensor]) -> Tensor:
        """The gradients of all losses that have a graph at an entrance, given by loss."""
        of_present = {i: rows[k] for i, k in enumerate(self._present) if k in rows}
        grads = stacked(of_present, len(self._present))
        # A loss may itself be a result of the trunk, beside those that enter there from a head.
        if grads is None or place in self.starts:
            seeds = self.seeds(place, self._present)
            grads = seeds if grads is None else grads + seeds
        return grads

    def _through_trunk(
        self, arriving: Mapping[Place, Tensor], places: Sequence[Place], retain_graph: bool
    ) -> dict[Place, Tensor | None]:
        if not places:
            return {}
        outputs, inputs = self.graph.edges(list(arriving)), self.graph.edges(places)
        bounds = pieces(len(self._present), self._at_once)
        with without_warning(self.graph.form.names[node] for node in self._ways.common):
            parts = [
                batched_gradients(
                    outputs,
                    inputs,
                    [grads[start:stop] for grads in arriving.values()],
                    retain_graph or stop < len(self._present),
                )
                for start, stop in bounds
            ]
        _PASSED.add(self._ways.kind)
        found = (self._joined(of_place) for of_place in zip(*parts, strict=True))
        return dict(zip(places, found, strict=True))

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """The pieces of the losses, with zeros for those that have no graph."""
        there = [part.detach() for part in parts if part is not None]
        if not there:
            return None
        grads = there[0] if len(there) == 1 else torch.cat(there)
        if len(grads) == len(self.starts):
            return grads
        whole = grads.new_zeros(len(self.starts), *grads.shape[1:])
        whole[self._present] = grads
        return whole
