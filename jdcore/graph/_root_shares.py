from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from typing import TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from jdcore._fields import through_tensor_hooks
from jdcore.graph._call import pull, pull_rows
from jdcore.graph._graph import Graph, Place
from jdcore.graph._memory import Memory
from jdcore.graph._objectives import Objectives
from jdcore.graph._plan import Plan
from jdcore.graph.shares import (
    Accumulator,
    Addend,
    Dense,
    Outer,
    OuterBeside,
    OuterLayers,
    Patches,
    Share,
    beside,
    combined,
    joined,
    sum_of,
)

_OURS = {Dense, Outer, Patches}

_Entry: TypeAlias = "tuple[Place, torch.Size]"


SHORT = 1 << 16
"""Entries of a row, below which few large products are faster than many small ones."""


@frozen(eq=False)
class Served:
    """
    What served an operand.

    :param operation: The name of the operation.
    :param root: The operand.
    :param share: Its share of the Jacobian.
    :param how: The rule, in words.
    """

    operation: str
    root: Place
    share: str
    how: str


class RootShares:
    """
    The shares that were made at the roots of parameters, and what becomes of them.

    Their Gramians are added up while they come in, as far as a share is all that a parameter has;
    uses of one parameter, and what is derived from parameters, wait until all are there. What is
    kept gives the weighted gradients later, and waits as well.

    :param plan: Where the roots are, and what belongs together.
    :param hooked: Parameters whose hooks have to see the rows.
    :param total: What the Gramians are added to, until :meth:`finish`.
    :param report: Whether to note in :attr:`served` what served each operand.
    """

    def __init__(
        self,
        graph: Graph,
        objectives: Objectives,
        plan: Plan,
        hooked: Set[int],
        memory: Memory,
        total: Accumulator,
        *,
        report: bool,
    ) -> None:
        self._graph, self._objectives, self._plan = graph, objectives, plan
        self._hooked, self._memory, self._report = hooked, memory, report
        self._total = total
        self._keep = total.keep
        self._shares: dict[Place, list[Share]] = {}
        self._layers: list[tuple[Sequence[Place], OuterLayers | OuterBeside]] = []
        self._short = ShortRows(total.keep)
        self.joins = total.joins and not report
        """Whether several layers may come as one."""
        self._biases: dict[Place, Place] = {}
        """By weights whose share is that of a bias as well, where the gradient of that belongs."""
        self._waiting: dict[Hashable, list[tuple[Place, Place, Share]]] = {}
        """Shares of the same inputs that are not added yet, with their roots and places."""
        self.graph_stays = True
        """Whether what operations saved stays in memory, beside what was copied for that."""
        self._room = memory.entries // 4  # for such copies
        # What is kept anyway is added after the pass: what the graph has freed by then leaves room
        # for temporaries, and products that follow on each other find their code in the caches.
        self._late: list[tuple[Addend, list[Place]]] | None = [] if total.keep else None
        self._finished: dict[int, Tensor] = {}
        self.served: list[Served] = []
        self.gradients_disjoint = False
        """Whether the weighted gradients are known to lie in memory of their own each."""
        self.sources: list[list[Place]] = []
        """The roots that each of the shares was made for, in the order in which they were added."""

    def take(
        self,
        root: Place,
        share: Share,
        operation: str,
        how: str,
        *,
        bias: Place | None = None,
        beside_others: bool = False,
    ) -> None:
        """
        Take a share.

        :param operation: The name of the operation that the root enters.
        :param how: How the share was made, in words.
        :param bias: The root whose Gramian is in that of this share, if there is one.
        :param beside_others: Whether others of the same inputs may follow, or have come before.
        """
        if self._report:
            self.served.append(Served(operation, root, repr(share), how))
        if root not in self._plan.alone:
            self._shares.setdefault(root, []).append(share)
            return
        place, share = self._at_end(root, share)
        if bias is not None:
            self._biases[place] = self._place_of(bias)
            if self._report and isinstance(share, Outer):
                of_bias = Dense(share.grads, self._graph.form.result(bias).shape)
                self.served.append(Served(operation, bias, repr(of_bias), "with its weight"))
        if isinstance(share, Dense) and share.shape.numel() < SHORT:
            self._short.add([place], share)
            return
        kind = beside(share) if beside_others and self.joins else None
        if kind is None:
            self._add_alone(root, place, share)
        else:
            self._waiting.setdefault((kind, bias is None), []).append((root, place, share))

    def _add_alone(self, root: Place, place: Place, share: Share) -> None:
        self._add(share, [root])
        if self._keep:
            self._shares.setdefault(place, []).append(share)

    def _add_waiting(self) -> None:
        """Add shares that waited for others of the same inputs."""
        for waiting in self._waiting.values():
            if len(waiting) == 1:
                self._add_alone(*waiting[0])
            else:
                roots, places, shares = zip(*waiting, strict=True)
                biases = [self._biases[place] for place in places if place in self._biases]
                shapes = [self._graph.form.result(bias).shape for bias in biases]
                self._add_several(OuterBeside(shares, shapes), roots, [*places, *biases])
        self._waiting.clear()

    def _add_several(
        self, layers: OuterLayers | OuterBeside, roots: Sequence[Place], places: Sequence[Place]
    ) -> None:
        self._add(layers, list(roots))
        if self._keep:
            self._layers.append((places, layers))

    def has_room(self, entries: int) -> bool:
        """Whether so many entries may be copied for several layers."""
        return entries <= self._room or not (self._keep and self.graph_stays)

    def take_layers(
        self, roots: Sequence[Place], share: Share, biases: Sequence[Place], entries: int
    ) -> None:
        """
        Take the shares of operands of several layers of one form, for one task.

        Each is a parameter that nothing else uses, as it is or turned.

        :param share: With the layers in the place of tasks.
        :param biases: The operands whose Gramian is in that of this share.
        :param entries: Of what was copied for it.
        """
        ends = [self._plan.ends[root] for root in roots]
        places = [(end.leaf, 0) for end in ends]
        if isinstance(share, Outer):
            bias = self._graph.form.result(biases[0]).shape if biases else None
            turned = share.turned() if ends[0].turned else share
            layers = OuterLayers(turned, bias, self._memory.joined)
            self._add_several(layers, roots, [*places, *map(self._place_of, biases)])
            self._room -= entries if self._keep else 0
        else:
            assert isinstance(share, Dense)
            self._short.add([*map(self._place_of, roots)], share)

    def finish(self) -> None:
        """Add what waited until all shares are there."""
        self._add_waiting()
        late, self._late = self._late, None
        for share, roots in late or ():
            self._add(share, roots)
        for group in self._plan.groups:
            self._add_group(group)
        if self._plan.derived:
            self._add_rows(self._plan.derived)
        for share, roots in self._short.shares():
            self._add(share, roots)
        # It has the same shares, which are to be freed one after the other by what weighs them.
        del self._total

    def _add(self, share: Addend, roots: list[Place]) -> None:
        if self._late is not None:
            self._late.append((share, roots))
            return
        self._total.add_share(share)
        self.sources.append(roots)

    def _place_of(self, root: Place) -> Place:
        """Where a gradient of the shape of a root belongs: at the parameter that it is as it is."""
        end = self._plan.ends.get(root)
        return root if end is None or end.turned else (end.leaf, 0)

    def _at_end(self, root: Place, share: Share) -> tuple[Place, Share]:
        """A share as that of a parameter, if its root is nothing but one, as it is or turned."""
        end = self._plan.ends.get(root)
        if end is not None and end.turned and isinstance(share, Outer):
            return (end.leaf, 0), share.turned()
        return self._place_of(root), share

    # -- parameters that are used several times, or derived ----------------------------------------

    def _add_group(self, group: Mapping[Place, bool | None]) -> None:
        pairs = [(root, share) for root in group for share in self._shares.get(root, ())]
        if not pairs:
            return
        outer = [
            share.turned() if group[root] else share
            for root, share in pairs
            if isinstance(share, Outer) and group[root] is not None
        ]
        if len(outer) == len(pairs):
            # Factored uses are multiplied pairwise; none of them needs its rows written out.
            self._add(joined(outer), list(group))
        elif len(group) == 1:
            rows = sum_of(share.rows() for _, share in pairs)
            self._add(Dense(rows, pairs[0][1].shape), list(group))
        else:
            self._add_rows(list(group))

    def _add_rows(self, roots: Sequence[Place]) -> None:
        """Carry rows from roots to parameters and add their Gramian there."""
        rows = {
            root: sum_of(share.rows() for share in self._shares[root]).flatten(0, 1)
            for root in dict.fromkeys(roots)
            if root in self._shares
        }
        if not rows:
            return
        for leaf, found in pull_rows(self._graph, self._plan, rows, self._memory).items():
            if leaf in self._hooked:
                found = self._finished[leaf] = _through_hooks(self._graph.wanted[leaf], found)
            sizes = self._objectives.tasks, self._objectives.samples
            by_task = found.reshape(*sizes, *found.shape[1:])
            self._add(Dense(by_task, self._graph.wanted[leaf].shape), [(leaf, 0)])

    # -- the weighted gradient ---------------------------------------------------------------------

    def weighted(self, by_task: Tensor) -> dict[Tensor, Tensor]:
        """
        The weighted gradients of the parameters that have shares; these are used up.

        :param by_task: Weights [K, B].
        """
        graph, grads = self._graph, self._short.weighted(by_task)
        while self._layers:
            places, layers = self._layers.pop()
            grads.update(zip(places, layers.weighted(by_task), strict=True))
        # In the order of the pass: the share of a last layer, which is narrow, frees more than its
        # gradient takes.
        for root in list(self._shares):
            shares = self._shares.pop(root)
            if bias := self._biases.get(root):
                [share] = shares
                assert isinstance(share, Outer)  # see above
                shape = graph.form.result(bias).shape
                grads[root], grads[bias] = share.weighted_with_bias(by_task, shape)
                continue
            of_uses = [_weighted(share, by_task) for share in shares]
            if root in grads:
                of_uses.append(grads[root])
            grads[root] = sum_of(of_uses) if len(of_uses) > 1 else of_uses[0]
        final = {
            graph.targets[place]: grads.pop(place).to(graph.form.result(place).dtype)
            for place in self._plan.ordinary
            if place in grads
        }
        # Operations may hand one gradient on to several leaves, or a part of it.
        self.gradients_disjoint = not [n for n, _ in grads if n not in graph.wanted]
        for leaf, grad in pull(graph, self._plan, grads).items():
            final[graph.leaves[leaf]] = grad
        for leaf, rows in self._finished.items():
            tensor = graph.wanted[leaf]
            share = Dense(rows[None], tensor.shape)
            final[tensor] = share.weighted(by_task.reshape(1, -1)).to(tensor.dtype)
        return final


def _weighted(share: Share, by_task: Tensor) -> Tensor:
    """The weighted gradient of a share, in memory of its own."""
    found = share.weighted(by_task)
    # Those of third parties may hand out what they keep, which must not become a `.grad`.
    return found if type(share) in _OURS else found.clone()


def _through_hooks(leaf: Tensor, rows: Tensor) -> Tensor:
    """What the hooks of a parameter make of each row, as in a backward pass of its own."""
    changed = [through_tensor_hooks({leaf: row})[leaf] for row in rows.to(leaf.dtype)]
    return torch.stack(changed)


class ShortRows:
    """
    Short rows of many parameters, multiplied together.

    :param keep: Whether :meth:`weighted` will be called.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._groups: dict[torch.dtype, list[tuple[list[_Entry], Tensor]]] = {}
        self._joined: list[tuple[Tensor, list[_Entry]]] = []

    def add(self, roots: Sequence[Place], share: Dense) -> None:
        """
        Add the rows of a share.

        :param roots: Where its gradient belongs; of several layers for one task, those of each,
            and the share has the layers in the place of tasks.
        """
        rows = share.flat_rows()
        if len(roots) > 1:
            rows = rows.transpose(0, 1).flatten(1)[None]
        entries = [(root, share.shape) for root in roots]
        self._groups.setdefault(rows.dtype, []).append((entries, rows))

    def shares(self) -> Iterator[tuple[Dense, list[Place]]]:
        """What is to be added to the Gramian, and the roots whose rows it is made of."""
        for parts in self._groups.values():
            rows = [of_roots for _, of_roots in parts]
            joined = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
            entries = [entry for of_rows, _ in parts for entry in of_rows]
            yield Dense(joined, joined.shape[2:]), [root for root, _ in entries]
            if self._keep:
                self._joined.append((joined, entries))
        self._groups.clear()

    def weighted(self, weights: Tensor) -> dict[Place, Tensor]:
        grads: dict[Place, Tensor] = {}
        for rows, entries in self._joined:
            summed = combined(weights.reshape(-1), rows.flatten(0, 1))
            parts: Sequence[Tensor] = [summed]
            if len(entries) > 1:
                views = torch.split(summed, [shape.numel() for _, shape in entries])
                # In memory of their own, by one call: to keep one of them must not keep all.
                parts = torch._foreach_mul(views, 1.0)
            for (root, shape), part in zip(entries, parts, strict=True):
                if len(shape) != 1:  # most of them are biases, and each view costs a call
                    part = part.view(shape)
                grads[root] = grads[root] + part if root in grads else part
        self._joined.clear()
        return grads
