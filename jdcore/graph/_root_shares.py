from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from typing import TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from jdcore._fields import disjoint, through_tensor_hooks
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
    Share,
    ShortRows,
    SingleRows,
    beside,
    joined,
    sum_of,
)

_Entry: TypeAlias = "tuple[Sequence[Place], Sequence[Place], Addend]"
"""The roots of a share, where its gradients belong, and it."""

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
        self._alone: list[_Entry] = []
        """What makes up parameters by itself, if it is kept."""
        self._shares: dict[Place, list[Share]] = {}
        """By root, the shares of others."""
        self._short: dict[torch.dtype, list[tuple[Sequence[Place], Dense]]] = {}
        """Short rows, and the places of each, which is several of layers that came as one."""
        self._single: list[tuple[Place, int, Tensor]] = []
        """Rows of single losses, with their places."""
        self.joins = total.joins and not report
        """Whether several layers may come as one."""
        self._waiting: dict[Hashable, list[tuple[Place, list[Place], Outer]]] = {}
        """Shares of the same inputs that are not added yet, with their roots and places."""
        self.graph_stays = True
        """Whether what operations saved stays in memory, beside what was copied for that."""
        self._room = memory.entries // 4  # for such copies
        self._finished: dict[int, Tensor] = {}
        self.served: list[Served] = []
        self.sources: list[Sequence[Place]] = []
        """The roots that each of the shares was made for, in the order in which they were added."""

    def take(
        self,
        roots: Sequence[Place],
        share: Share,
        operation: str,
        how: str,
        *,
        biases: Sequence[Place] = (),
        beside_others: bool = False,
        copied: int = 0,
        only: int | None = None,
    ) -> None:
        """
        Take a share.

        :param roots: Its root; those of several layers of one form, if it has these in the place of
            tasks. Each of these is a parameter that nothing else uses, as it is or turned.
        :param operation: The name of the operation that the root enters.
        :param how: How the share was made, in words.
        :param biases: The roots whose Gramian is in that of this share, if there are any.
        :param beside_others: Whether others of the same inputs may follow, or have come before.
        :param copied: Entries of what was copied for it.
        :param only: The one loss whose row it is, None if it has a row of each.
        """
        if self._report:
            self.served.append(Served(operation, roots[0], repr(share), how))
            if isinstance(share, Outer):
                for bias in biases:
                    of_bias = Dense(share.grads, self._graph.form.result(bias).shape)
                    self.served.append(Served(operation, bias, repr(of_bias), "with its weight"))
        if roots[0] not in self._plan.alone:
            self._shares.setdefault(roots[0], []).append(share)
            return
        end = self._plan.ends.get(roots[0])
        if end is not None and end.turned and isinstance(share, Outer):
            share, places = share.turned(), [(self._plan.ends[root].leaf, 0) for root in roots]
        else:
            places = [*map(self._place_of, roots)]
        places += map(self._place_of, biases)
        if only is not None:
            self._single.append((places[0], only, share.rows()[0, 0]))
            if not self._keep and share.shape.numel() >= SHORT:
                self._add_single()  # it may be as large as fits into memory
        elif isinstance(share, Dense) and share.shape.numel() < SHORT:
            self._short.setdefault(share.dtype, []).append((places, share))
        elif len(roots) > 1:
            assert isinstance(share, Outer)  # nothing else comes with several layers
            self._add_alone(roots, places, OuterLayers(share, self._memory.joined))
            self._room -= copied if self._keep else 0
        elif isinstance(share, Outer) and beside_others and self.joins and (kind := beside(share)):
            self._waiting.setdefault(kind, []).append((roots[0], places, share))
        else:
            self._add_alone(roots, places, share)

    def _add_alone(self, roots: Sequence[Place], places: Sequence[Place], share: Addend) -> None:
        # What is kept anyway is added after the pass: what the graph has freed by then leaves room
        # for temporaries, and products that follow on each other find their code in the caches.
        if self._keep:
            self._alone.append((roots, places, share))
        else:
            self._add(share, roots)

    def _add_waiting(self) -> None:
        """Add shares that waited for others of the same inputs."""
        for waiting in self._waiting.values():
            roots, places, shares = zip(*waiting, strict=True)
            share = OuterBeside(shares) if len(shares) > 1 else shares[0]
            self._add_alone(roots, _by_kind(places), share)
        self._waiting.clear()

    def has_room(self, entries: int) -> bool:
        """Whether so many entries may be copied for several layers."""
        return entries <= self._room or not (self._keep and self.graph_stays)

    def finish(self) -> None:
        """Add what waited until all shares are there."""
        self._add_waiting()
        for roots, _, share in self._alone:
            self._add(share, roots)
        for group in self._plan.groups:
            self._add_group(group)
        if self._plan.derived:
            self._add_rows(self._plan.derived)
        for same in self._short.values():
            places = [place for of_share, _ in same for place in of_share]
            rows = [_side_by_side(share) if len(p) > 1 else share.flat_rows() for p, share in same]
            shapes = [share.shape for of_share, share in same for _ in of_share]
            self._add_last(places, ShortRows(rows, shapes))
        self._short.clear()
        self._add_single()
        # It has the same shares, which are to be freed one after the other by what weighs them.
        del self._total

    def _add_single(self) -> None:
        """Add rows of single losses."""
        if self._single:
            places, losses, rows = map(list, zip(*self._single, strict=True))
            self._single.clear()
            self._add_last(places, SingleRows(rows, losses))

    def _add_last(self, places: Sequence[Place], share: Addend) -> None:
        self._add(share, places)
        if self._keep:
            self._alone.append((places, places, share))

    def _add(self, share: Addend, roots: Sequence[Place]) -> None:
        self._total.add_share(share)
        self.sources.append(roots)

    def _place_of(self, root: Place) -> Place:
        """Where a gradient of the shape of a root belongs: at the parameter that it is as it is."""
        end = self._plan.ends.get(root)
        return root if end is None or end.turned else (end.leaf, 0)

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
        graph, grads = self._graph, dict[Place, Tensor]()
        # In the order of the pass: the share of a last layer, which is narrow, frees more than its
        # gradient takes.
        self._alone.reverse()
        while self._alone:
            _, places, alone = self._alone.pop()
            grads.update(zip(places, alone.gradients(by_task), strict=True))
            del alone
        for root in list(self._shares):
            grads[root] = sum_of(share.gradients(by_task)[0] for share in self._shares.pop(root))
        final = {
            graph.targets[place]: grads.pop(place).to(graph.form.result(place).dtype)
            for place in self._plan.ordinary
            if place in grads
        }
        pulled = pull(graph, self._plan, grads)
        final |= {graph.leaves[leaf]: grad for leaf, grad in pulled.items()}
        # Operations may hand one gradient on to several leaves, or a part of it.
        passed = {graph.leaves[n]: g for n, g in pulled.items() if grads.get((n, 0)) is not g}
        if passed:
            final |= zip(passed, disjoint(passed.values()), strict=True)
        for leaf, rows in self._finished.items():
            tensor = graph.wanted[leaf]
            share = Dense(rows[None], tensor.shape)
            final[tensor] = share.weighted(by_task.reshape(1, -1)).to(tensor.dtype)
        return final


def _through_hooks(leaf: Tensor, rows: Tensor) -> Tensor:
    """What the hooks of a parameter make of each row, as in a backward pass of its own."""
    changed = [through_tensor_hooks({leaf: row})[leaf] for row in rows.to(leaf.dtype)]
    return torch.stack(changed)


def _by_kind(places: Sequence[Sequence[Place]]) -> list[Place]:
    """Those of weights, and behind them those of biases, of several layers."""
    return [place for of_kind in zip(*places, strict=True) for place in of_kind]


def _side_by_side(layers: Dense) -> Tensor:
    """Rows [K, B, n] of several layers for one task, as those of one."""
    return layers.flat_rows().transpose(0, 1).flatten(1)[None]
