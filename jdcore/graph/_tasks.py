"""
Gradients of losses without samples, each of which has its own way through the graph.

Where all losses pass through an operation (in the trunk of a network, or anywhere), their gradients
may do so together, in one batched pass. What only some pass through (their heads) is left to a pass
for each loss, which ends where the trunk begins and meets no head of another loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from jdcore.graph._batchable import is_batchable
from jdcore.graph._cost import batch_beats_single_passes
from jdcore.graph._graph import Graph, Place
from jdcore.graph._memory import Memory, pieces
from jdcore.graph._passes import batched_gradients, dense_grad, differentiate, stacked

_Kind: TypeAlias = "frozenset[tuple[str, tuple[torch.dtype, ...]]]"

# Operations, by their names and dtypes, that a batched pass went through, or failed in.
_PASSED: set[_Kind] = set()
_FAILED: set[_Kind] = set()

_JOINS = {"StackBackward0", "CatBackward0"}
"""Operations that do nothing but put losses into a row."""


@frozen
class Start:
    """
    Where the gradient of a loss starts.

    :param place: The result that the loss is an entry of.
    :param entry: Which entry.
    :param device: Where it is.
    """

    place: Place
    entry: int
    device: torch.device


def starts_of(graph: Graph, outputs: Sequence[Tensor]) -> list[Start | None]:
    """
    Where each of the flattened losses starts; None for one that has no graph.

    A loss that was put into a row with others starts where it was computed.
    """
    found: list[Start | None] = []
    places = iter(graph.starts)
    for output in outputs:
        if output.requires_grad:
            found += _entries(graph, next(places), output.device)
        else:
            found += [None] * output.numel()
    return found


def _entries(graph: Graph, place: Place, device: torch.device) -> list[Start]:
    whole = graph.result(place)
    entries = [Start(place, i, device) for i in range(whole.shape.numel())]
    if graph.names[place[0]] not in _JOINS or len(whole.shape) != 1 or place in graph.targets:
        return entries
    found: list[Start] = []
    for part in graph.inputs[place[0]]:
        # What is no operation has no place to start at; another dtype would need a conversion.
        if part[0] < 0 or part[0] in graph.leaves or graph.result(part).dtype != whole.dtype:
            return entries
        found += _entries(graph, part, device)
    return found if len(found) == len(entries) else entries


@frozen
class Ways:
    """
    Which losses pass through which operations on their way to the wanted tensors.

    :param losses: By operation, the losses as bits of a number.
    :param common: The operations that all losses pass through, and behind which only such follow.
    """

    losses: Mapping[int, int]
    common: frozenset[int]

    @classmethod
    def of(cls, graph: Graph, starts: Sequence[Start | None]) -> Ways:
        """Follow the losses of a graph."""
        at: dict[Place, int] = {}
        for k, start in enumerate(starts):
            if start is not None:
                at[start.place] = at.get(start.place, 0) | 1 << k
        everything = sum(1 << k for k, start in enumerate(starts) if start is not None)
        losses: dict[int, int] = {}
        starting = [node for node, _ in at]
        for place, found in at.items():
            losses[place[0]] = losses.get(place[0], 0) | found
        for node in reversed(graph.upwards):
            passing = losses.get(node, 0)
            for child in graph.inputs[node] if passing else ():
                if child[0] in graph.leading:
                    losses[child[0]] = losses.get(child[0], 0) | passing
                    at[child] = at.get(child, 0) | passing
        # Each result, not only one of several: what a loss does not reach is not zero but nothing.
        partly = {n for (n, _), found in at.items() if found != everything} - graph.leaves.keys()
        return cls(losses, _common(graph, losses, starting, partly))


def _common(
    graph: Graph, losses: Mapping[int, int], starts: Collection[int], partly: Collection[int]
) -> frozenset[int]:
    """
    The operations of the trunk.

    :param losses: What passes through which operations.
    :param starts: The operations that losses are results of.
    :param partly: Those that not all losses pass through in the same way.
    """
    inner = [node for node in graph.upwards if node in losses and node not in graph.leaves]
    found = set(inner) - graph.above(partly) - set(partly)
    # The pass of a head ends where it enters the trunk. It must not go on through the trunk to
    # another such place, or to a parameter that both of them use.
    while True:
        heads = [node for node in inner if node not in found]
        met = {child for node in heads for child, _ in graph.inputs[node]}
        both = {n for n in found if any(c in met and c in graph.wanted for c, _ in graph.inputs[n])}
        wrong = found & (graph.above((met | set(starts)) & found | both) | both)
        if not wrong:
            return frozenset(found)
        found -= wrong


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Passes:
    """
    The backward passes of losses without samples.

    :param graph: The graph.
    :param starts: Where each loss starts.
    :param memory: How large temporaries may be.
    :param apart: Whether each loss has to have a pass of its own.
    """

    graph: Graph
    starts: Sequence[Start | None]
    memory: Memory
    apart: bool

    def gradients(self, places: Sequence[Place], *, retain_graph: bool) -> list[Tensor | None]:
        """
        The gradients of all losses at some places.

        :returns: Shape ``[K, *result.shape]`` each, None where no loss arrives.
        """
        if self._at_once == 1:
            return self._one_by_one(places, retain_graph)
        # Nothing is freed before operations of this kind are known to pass.
        known = self._kind in _PASSED
        try:
            return self._batched(places, retain_graph or not known)
        except RuntimeError:
            if known and not retain_graph:
                raise
        found = self._one_by_one(places, retain_graph)
        _FAILED.add(self._kind)
        return found

    def _one_by_one(self, places: Sequence[Place], retain_graph: bool) -> list[Tensor | None]:
        rows = [self._single(k, places, retain_graph) for k in range(len(self.starts))]
        return [stacked(of_place) for of_place in zip(*rows, strict=True)]

    def _single(
        self, k: int, places: Sequence[Place], retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of one loss."""
        start = self.starts[k]
        if start is None:
            return [None] * len(places)
        edges = [self.graph.edge(place) for place in places]
        seed = self._seeds(start.place, [k])[0]
        retain = retain_graph or k in self._met_again
        found = differentiate([self.graph.edge(start.place)], edges, [seed], retain)
        return [None if grad is None else dense_grad(grad.detach()) for grad in found]

    def _seeds(self, place: Place, losses: Sequence[int]) -> Tensor:
        """What some losses start with at a place: one at their entry, else zero."""
        result = self.graph.result(place)
        starts = [(i, s) for i, k in enumerate(losses) if (s := self.starts[k]) is not None]
        device = starts[0][1].device
        seeds = torch.zeros(len(losses), result.shape.numel(), dtype=result.dtype, device=device)
        here = [(i, start.entry) for i, start in starts if start.place == place]
        if len(losses) == 1:
            seeds[0, here[0][1]] = 1
        elif here == [(i, i) for i in range(seeds.shape[1])]:
            seeds.fill_diagonal_(1)
        elif here:
            rows, entries = torch.tensor(here, device=device).T
            seeds[rows, entries] = 1
        return seeds.view(len(losses), *result.shape)

    @cached_property
    def _ways(self) -> Ways:
        return Ways.of(self.graph, self.starts)

    @cached_property
    def _met_again(self) -> set[int]:
        """The losses that pass through an operation that a later one passes through as well."""
        patterns = {found for found in self._ways.losses.values() if found & (found - 1)}
        again = 0
        for found in patterns:
            again |= found & ~(1 << found.bit_length() - 1)
        return {k for k in range(len(self.starts)) if again >> k & 1}

    # -- all at once -------------------------------------------------------------------------------

    @cached_property
    def _present(self) -> list[int]:
        return [k for k, start in enumerate(self.starts) if start is not None]

    @cached_property
    def _kind(self) -> _Kind:
        graph = self.graph
        return frozenset(
            (graph.names[node], tuple([result.dtype for result in graph.results[node]]))
            for node in self._ways.common
        )

    @cached_property
    def _at_once(self) -> int:
        """How many losses go through the trunk together."""
        count, graph = len(self._present), self.graph
        if count < 2 or self.apart or not self._ways.common or self._kind in _FAILED:
            return 1
        if not all(is_batchable(graph.names[n], graph.nodes[n]) for n in self._ways.common):
            return 1
        # What only rearranges parameters is not met by gradients.
        inner = self._ways.common - graph.rearranged
        sizes = [r.shape.numel() for node in inner for r in graph.results[node]]
        if self.memory.reused:
            leaves = {
                c for n in self._ways.common for c, _ in graph.inputs[n]
            } & graph.wanted.keys()
            weights = [graph.wanted[leaf].numel() for leaf in leaves]
            if not batch_beats_single_passes(count, len(inner), sum(sizes), weights):
                return 1
        largest = max(sizes, default=1)
        return max(1, min(count, self.memory.entries // max(1, largest)))

    def _batched(self, places: Sequence[Place], retain_graph: bool) -> list[Tensor | None]:
        common, graph = self._ways.common, self.graph
        behind = {place for node in common for place in graph.inputs[node]}
        of_trunk = [p for p in places if p[0] in common or p in behind]
        of_heads = [p for p in places if p[0] not in common and p not in behind]
        entrances = self._entrances()
        rows = [
            [None] * (len(of_heads) + len(entrances))
            if start is None or start.place[0] in common
            else self._single(k, [*of_heads, *entrances], retain_graph)
            for k, start in enumerate(self.starts)
        ]
        found = dict(zip([*of_heads, *entrances], zip(*rows, strict=True), strict=True))
        arriving = {
            place: self._arriving(place, [found[place][k] for k in self._present])
            for place in entrances
        }
        grads = {place: stacked(found[place]) for place in of_heads}
        grads |= self._through_trunk(arriving, of_trunk, retain_graph)
        return [grads[place] for place in places]

    def _entrances(self) -> list[Place]:
        """Where gradients enter the trunk."""
        common, losses = self._ways.common, self._ways.losses
        found = [start.place for start in self.starts if start is not None]
        found += [place for node in losses.keys() - common for place in self.graph.inputs[node]]
        return [place for place in dict.fromkeys(found) if place[0] in common]

    def _arriving(self, place: Place, rows: Sequence[Tensor | None]) -> Tensor:
        """The gradients of all losses at an entrance."""
        grads = stacked(rows)
        starting = any(s is not None and s.place == place for s in self.starts)
        if grads is None or starting:
            seeds = self._seeds(place, self._present)
            grads = seeds if grads is None else grads + seeds
        return grads

    def _through_trunk(
        self, arriving: Mapping[Place, Tensor], places: Sequence[Place], retain_graph: bool
    ) -> dict[Place, Tensor | None]:
        if not places:
            return {}
        outputs = [self.graph.edge(place) for place in arriving]
        inputs = [self.graph.edge(place) for place in places]
        bounds = pieces(len(self._present), self._at_once)
        parts = [
            batched_gradients(
                outputs,
                inputs,
                [grads[start:stop] for grads in arriving.values()],
                retain_graph or stop < len(self._present),
            )
            for start, stop in bounds
        ]
        _PASSED.add(self._kind)
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
