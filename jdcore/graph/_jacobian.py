from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from jdcore._fields import dense, through_tensor_hooks
from jdcore._modes import without_autocast
from jdcore.errors import JDCoreError, RowByRowWarning, UnservedGraphError, warn
from jdcore.graph._call import called_shares
from jdcore.graph._cancelling import multiplied
from jdcore.graph._form import Place
from jdcore.graph._graph import Graph
from jdcore.graph._hooks import has_hook_for_several, may_have_hooks
from jdcore.graph._memory import Memory
from jdcore.graph._objectives import Objectives, OneByOne
from jdcore.graph._passes import Grads, Listener, differentiate
from jdcore.graph._plan import Plan, Plans, Spot, plan_of_tasks
from jdcore.graph._probe import Nested
from jdcore.graph._pull import pull, pull_rows
from jdcore.graph._saved import Unreadable, function_of
from jdcore.graph._site import NoRule, Site
from jdcore.graph._tampering import refused_tampering, tampers
from jdcore.graph._tasks import Passes, starts_of
from jdcore.graph.rules import RULES, Rule, Rules
from jdcore.graph.shares import (
    Accumulator,
    Dense,
    Outer,
    Share,
    Sums,
    Uses,
    Waiting,
    combined,
    sum_of,
)
from jdcore.linalg import factors

# Rows that are shorter are collected and multiplied together: few large products, no small ones.
_SMALL = 1 << 16


_HOOKED = (
    "there are hooks that were made since the last call, and torch does not show whether they are "
    "on tensors of this graph"
)


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


class Jacobian:
    """
    The Jacobian of some losses, as shares at the roots of parameters.

    :param objectives: The losses.
    :param wanted: The parameters.
    :param plans: What is known of graphs of this kind.
    :param rules: What is known of operations.
    :param budget: Bytes that a temporary may have; None lets the library choose.
    :param all_leaves: Whether weighted gradients are wanted for all leaves behind the losses.
    :param report: Whether to note in :attr:`served` what served each operand.
    :raises UnservedGraphError: If it cannot be right.
    """

    def __init__(
        self,
        objectives: Objectives,
        wanted: Sequence[Tensor],
        plans: Plans,
        *,
        rules: Rules | None = None,
        budget: int | None = None,
        all_leaves: bool = False,
        report: bool = False,
    ) -> None:
        self._report = report
        self._plans, self._rules = plans, rules or Rules()
        self._device = objectives.outputs[0].device
        self._all_leaves = all_leaves
        self._memory = Memory.of(self._device, budget, objectives.outputs[0].dtype)
        self.graph = Graph(objectives.outputs, wanted)
        self._given = [tensor for tensor in wanted if tensor.is_leaf]
        # Torch has no public way to ask whether a tensor has hooks.
        self._hooked = {i for i, leaf in self.graph.wanted.items() if leaf._backward_hooks}
        self._apart = any(t._backward_hooks for t in self.graph.leaves.values()) or any(
            not t.is_leaf for t in [*self.graph.targets.values(), *self.graph.retained]
        )
        """Whether somebody hears the gradients of passes, who must not meet several in one."""
        self.objectives = objectives
        self.one_by_one: str | None = None
        """Why each loss gets a backward pass of its own, if that is so in spite of samples."""
        self._refuse_hooks_for_several()
        if may_have_hooks(self.graph):
            self._take_plain_rows(_HOOKED)
        elif any(has_hook_for_several(self.graph.wanted[i], "any") for i in self._hooked):
            self._take_plain_rows("a parameter has a hook that hears of one gradient in a pass")
        # Such a loss is behind no operation.
        elif {n for n, _ in self.graph.form.starts} & self.graph.leaves.keys():
            self._take_plain_rows("a loss is a parameter itself")
        elif self._is_tampered_with():
            self._take_plain_rows("a function writes into the gradients that its backward is given")
        self._forget()
        self.computed = False
        self._plan: Plan

    def _is_tampered_with(self) -> bool:
        with torch.no_grad(), without_autocast(self._device.type), self.fields_unchanged():
            return tampers(self.graph, self.objectives.outputs)

    def _refuse_hooks_for_several(self) -> None:
        heard = self.graph.leaves if self._all_leaves else self.graph.wanted
        # Torch tells these hooks only of leaves that a pass accumulates into, and ours accumulate
        # into none.
        if any(has_hook_for_several(leaf, "all") for leaf in heard.values()):
            raise UnservedGraphError(
                "a hook of register_multi_grad_hook on parameters",
                "it hears only of gradients that are accumulated",
                "Remove it for this step, or use jdcore.autojac.backward and jac_to_grad.",
            )

    # -- the Gramian -------------------------------------------------------------------------------

    def gramian(self, *, keep: bool, retain_graph: bool) -> Tensor:
        """
        The Gramian of the flattened losses, float64 [m, m].

        :param keep: Whether :meth:`weighted` will be called.
        :param retain_graph: Whether the graph is needed afterwards.
        """
        rows, precision = self.objectives.rows, self.graph.form.precision
        if rows == 0:
            self.computed = True
            return torch.zeros(0, 0, dtype=torch.float64, device=self._device)
        made: list[Accumulator] = []

        def added_up() -> tuple[Tensor, bool]:
            if made:
                made.append(self._added_up_again(made[0], retain_graph))
            else:
                # Without what is kept, all may have to be done once more.
                again = not keep and precision != torch.float64
                made.append(self._added_up(keep, retain_graph or again))
            found = made[-1].total
            return found, made[-1].cancelled(found)

        return self.objectives.ordered(multiplied(rows, precision, added_up))

    def _added_up(self, keep: bool, retain_graph: bool) -> Accumulator:
        total = Accumulator(self.objectives.rows, self._device, keep, self._memory)
        self._add_all(total, retain_graph)
        return total

    def _added_up_again(self, before: Accumulator, retain_graph: bool) -> Accumulator:
        """The same shares once more, or all over again if they were not kept."""
        if not before.keep:
            self._forget()
            return self._added_up(False, retain_graph)
        total = Accumulator(self.objectives.rows, self._device, True, self._memory)
        with torch.no_grad(), without_autocast(self._device.type):
            for share in before.added:
                total.add_share(share)
            total.finish()
        return total

    def add_to(self, total: Accumulator, *, retain_graph: bool) -> None:
        """
        Add the shares of all parameters to a Gramian.

        :param total: Of the rows in the order [K, B].
        :param retain_graph: Whether the graph is needed afterwards.
        """
        self._add_all(total, retain_graph)

    def _add_all(self, total: Accumulator, retain_graph: bool) -> None:
        self.computed = True
        with torch.no_grad(), without_autocast(self._device.type):
            with self.fields_unchanged():
                self._plan = self._find_plan()
                run = self._run_tasks if self._without_samples else self._run
                # Passes that end at parameters leave nothing that could be written to.
                plain = isinstance(self.objectives, OneByOne)
                with nullcontext() if plain else refused_tampering(self.graph):
                    run(total, retain_graph)
            for group in self._plan.groups:
                self._add_group(group, total)
            self._add_pulled(total)
            for share, roots in self._small.shares(total.keep):
                self._add(share, total, roots)
            total.finish()

    def _forget(self) -> None:
        self.shares: dict[Place, list[Share]] = {}
        self._small = _Small(self._memory)
        self._finished: dict[int, Tensor] = {}
        self.served: list[Served] = []
        self.sources: list[list[Place]] = []
        """The roots that each of the shares was made for, in the order in which they were added."""

    @property
    def memory(self) -> Memory:
        """How temporaries are made."""
        return self._memory

    @property
    def _without_samples(self) -> bool:
        return self.objectives.batch_dim is None or self.objectives.samples == 1

    def _take_plain_rows(self, reason: str) -> None:
        """Give each loss a backward pass of its own: only that runs hooks as they are meant."""
        if not self._without_samples:
            self.one_by_one = reason
            warn(RowByRowWarning(self.objectives.rows, reason))
        self.objectives = OneByOne(self.objectives.outputs, self.objectives.batch_dim)
        self._apart = True
        self._hooked = set(self.graph.wanted)

    def _find_plan(self) -> Plan:
        objectives, batch_dim = self.objectives, self.objectives.batch_dim
        if not self._without_samples and batch_dim is not None:
            output = objectives.outputs[0]
            try:
                return self._plans.find(self.graph, output, batch_dim, self._hooked, self._rules)
            # An error that says what to do about a graph is not a sign of a function that stops at
            # NaN.
            except JDCoreError:
                raise
            except Nested:
                self._take_plain_rows("samples lie in nested tensors")
            except Exception:
                # A function that stops at NaN does not show where the samples are.
                if not any(function_of(node) for node in self.graph.nodes):
                    raise
                self._take_plain_rows("a function of the graph fails where gradients are NaN")
        return self._of_tasks

    @cached_property
    def _of_tasks(self) -> Plan:
        return plan_of_tasks(self.graph, self.objectives.rows, self._hooked)

    @contextmanager
    def fields_unchanged(self) -> Iterator[None]:
        """
        Leave every ``.grad`` as it is, also of tensors that retain it.

        :raises UnservedGraphError: At the end, if a function accumulates into ``.grad`` in its
            backward, unseen by the graph.
        """
        tensors = [t for t in self.graph.targets.values() if not t.is_leaf]  # they retain it
        tensors += self.graph.retained
        kept = len(tensors)
        # Only the backward of a Python function can accumulate into parameters behind torch's back.
        if self.graph.form.has_functions:
            tensors += self._given
        before = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            # Where there is no gradient, nothing can be added to one in place, and a new one shows.
            tensor.grad = None
        try:
            yield
            hidden = any(tensor.grad is not None for tensor in tensors[kept:])
        finally:
            for tensor, grad in zip(tensors, before, strict=True):
                tensor.grad = grad
        if hidden:
            raise UnservedGraphError(
                "a function whose backward accumulates into .grad",
                "it does not return all gradients, as in a reversible block",
                "Use functions that return the gradients of their parameters.",
            )

    def _run(self, total: Accumulator, retain_graph: bool) -> None:
        """All tasks, with samples. The last one is listened to, so that nothing need be kept."""
        plan, objectives = self._plan, self.objectives
        # Nodes without a rule are called afterwards, and other leaves differentiated.
        retain_graph |= bool(self._others()) or bool(plan.left)
        retain_graph |= plan.called is None or bool(plan.called)
        # So may be others, as a rule of a plugin may hold for some data only.
        retain_graph |= any(self.graph.form.names[node] not in RULES for node in plan.frontier)
        first, tasks = self._all_but_the_last(), objectives.tasks
        unserved: dict[int, tuple[Site, list[int]]] = {}

        def receive(node: int, grads: Grads, tensors: Mapping[str, Any]) -> None:
            rows = (
                [_row(grad) for grad in grads]
                if tasks == 1
                else [_joined(first.pop((node, i), None), g, tasks) for i, g in enumerate(grads)]
            )
            found = self._serve(node, rows, total, tensors)
            if found is not None:
                unserved[node] = found

        listener = Listener(self.graph, plan.frontier, late=plan.late, room=self._memory.waiting)
        seed = objectives.seeds_of_tasks([tasks - 1])[0]
        listener.run(objectives.outputs, [seed], receive, retain_graph=retain_graph)
        # What is left arrived from earlier tasks alone: the last one does not reach these nodes.
        for node in dict.fromkeys(node for node, _ in list(first)):
            receive(node, [None] * len(self.graph.form.results[node]), {})
        for node, (site, rest) in unserved.items():
            self._call(site, plan.spot(self.graph.form, node), rest, total)
        plan.called = {*(plan.called or ()), *unserved}

    def _all_but_the_last(self) -> dict[Place, Tensor]:
        """The gradients of tasks at the operations of the frontier, shape [K - 1, ...] each."""
        graph, objectives = self.graph, self.objectives
        count = objectives.tasks - 1
        if count == 0:
            return {}
        [start] = graph.form.starts

        def seeds(place: Place, tasks: Sequence[int]) -> Tensor:
            return objectives.seeds_of_tasks(tasks)

        passes = Passes(graph, [start] * count, seeds, self._memory, self._apart)
        places = [place for place in graph.form.used if place[0] in self._plan.frontier]
        found = zip(places, passes.gradients(places, retain_graph=True), strict=True)
        return {place: grads for place, grads in found if grads is not None}

    def _run_tasks(self, total: Accumulator, retain_graph: bool) -> None:
        """All tasks, without samples: ordinary gradients, beside shares of products."""
        plan, graph = self._plan, self.graph
        starts = starts_of(graph, self.objectives)
        passes = Passes(graph, starts.places, starts.seeds, self._memory, self._apart)
        # What operations saved is read afterwards, and other leaves differentiated.
        retain_graph |= bool(self._others()) or bool(plan.frontier)
        groups = [plan.ordinary] if total.keep else self._groups(plan.ordinary)
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            products = list(plan.frontier) if last else []
            places = [*group, *((node, 0) for node in products)]
            grads = passes.gradients(places, retain_graph=retain_graph or not last)
            for place, of_place in zip(group, grads, strict=False):
                self._take_ordinary(place, of_place, total)
            for node in reversed(products):
                self._serve(node, [grads.pop()], total, {})

    def _take_ordinary(self, place: Place, grads: Tensor | None, total: Accumulator) -> None:
        if grads is not None:
            share = Dense(grads[:, None], grads.shape[1:])
            self._plan.alone.add(place)
            self._take(place, share, total, "a parameter", "ordinary gradients")

    def _groups(self, places: list[Place]) -> list[list[Place]]:
        """Such that the rows of a group are not larger than allowed, or than those of one place."""
        sizes = [self.graph.form.result(place).shape.numel() for place in places]
        # A place whose rows alone exceed the limit makes a group of its own.
        largest = max([self._memory.held // max(1, self.objectives.rows), *sizes])
        groups: list[list[Place]] = [[]]
        filled = 0
        for place, size in zip(places, sizes, strict=True):
            if filled + size > largest and groups[-1]:
                groups.append([])
                filled = 0
            groups[-1].append(place)
            filled += size
        return groups

    @property
    def too_large(self) -> bool:
        """Whether the rows take more memory than should be kept."""
        if not self._without_samples:
            return False
        size = sum(self.graph.form.result(place).shape.numel() for place in self._of_tasks.ordinary)
        return self.objectives.rows * size > self._memory.held

    # -- shares ------------------------------------------------------------------------------------

    def _serve(
        self,
        node: int,
        grads: Sequence[Tensor | None],
        total: Accumulator,
        tensors: Mapping[str, Any],
    ) -> tuple[Site, list[int]] | None:
        """
        All gradients at an operation of the frontier are there: make the shares of what enters it.

        :param grads: At its results, shape ``[K, *result.shape]`` each.
        :param tensors: What it saved, if a pass may have freed it.
        :returns: The operation and its operands without a rule, None if there is none.
        """
        spot = self._plan.spot(self.graph.form, node)
        if spot.silent:
            # Where nothing depends on a result, what arrives there is zero.
            pairs = zip(spot.layouts, grads, strict=True)
            grads = [None if layout is None else grad for layout, grad in pairs]
        if all(g is None for g in grads):
            return None
        of_place = spot.name, grads, spot.layouts, spot.shapes, spot.known
        site = Site(self.graph.nodes[node], *of_place, tensors)
        rest, shares = [], {}
        # Of complex numbers some factors are conjugated, which the node itself knows best.
        make = None if spot.complex else self._rules.find(site.name, site.node)
        for operand in spot.roots:
            share = _made(make, site, operand)
            if share is None:
                rest.append(operand)
            else:
                shares[operand] = share
        if spot.may_join:
            self._join_bias(site, spot, shares)
        for operand, share in shares.items():
            self._take(spot.roots[operand], share, total, spot.name, "closed form")
        return (site, rest) if rest else None

    def _join_bias(self, site: Site, spot: Spot, shares: dict[int, Share]) -> None:
        """The bias of a linear layer is the weight of one more input, which is 1."""
        weight, bias = shares.get(2), shares.get(0)
        if not (isinstance(bias, Dense) and isinstance(weight, Outer)):
            return
        _, _, positions, outputs = weight.grads.shape
        # One bias may be added to all outputs, or more of it than of the product.
        if positions > 1 or bias.shape.numel() != outputs:
            return
        # Only then do both have the same gradient: that of the product times alpha, that of the
        # bias times beta.
        if site.saved("alpha") == site.saved("beta"):
            weight.plus = 1.0
            root = spot.roots[0]
            del shares[0]
            if self._report:
                self._note(root, bias, spot.name, "with its weight")
            place, _ = self._at_end(root, bias)
            self._small.add(place, bias, counted=True)

    def _call(self, site: Site, spot: Spot, rest: list[int], total: Accumulator) -> None:
        """Call an operation whose rule does not serve some of its operands."""
        masks = [
            None if g is None or layout is None else layout.masks(g[0])
            for g, layout in zip(site.grads, site.layouts, strict=True)
        ]
        shapes = {operand: site.shapes[operand] for operand in rest}
        for operand, share in called_shares(
            site.node, site.name, site.grads, masks, shapes, self._memory
        ).items():
            self._take(spot.roots[operand], share, total, spot.name, "called for each sample")

    def _note(self, root: Place, share: Share, operation: str, how: str) -> None:
        self.served.append(Served(operation, root, repr(share), how))

    def _add(self, share: Share, total: Accumulator, roots: list[Place]) -> None:
        total.add_share(share)
        self.sources.append(roots)

    def _at_end(self, root: Place, share: Share) -> tuple[Place, Share]:
        """A share as that of a parameter, if its root is nothing but one, as it is or turned."""
        end = self._plan.ends.get(root)
        if end is None:
            return root, share
        if end.turned:
            if not isinstance(share, Outer):
                return root, share
            share = share.turned()
        return (end.leaf, 0), share

    def _take(
        self, root: Place, share: Share, total: Accumulator, operation: str, how: str
    ) -> None:
        if self._report:
            self._note(root, share, operation, how)
        place = root
        if root in self._plan.alone:
            place, share = self._at_end(root, share)
            if isinstance(share, Dense) and share.shape.numel() < _SMALL:
                self._small.add(place, share)
                return
            self._add(share, total, [root])
            if not total.keep:
                return
        self.shares.setdefault(place, []).append(share)

    # -- parameters that are used several times, or derived ----------------------------------------

    def _add_group(self, group: Mapping[Place, bool | None], total: Accumulator) -> None:
        pairs = [(root, share) for root in group for share in self.shares.get(root, ())]
        if not pairs:
            return
        outer = [
            share.turned() if group[root] else share
            for root, share in pairs
            if isinstance(share, Outer) and group[root] is not None
        ]
        if len(outer) == len(pairs):
            # Factored uses are multiplied pairwise; none of them needs its rows written out.
            self._add(Uses(outer), total, list(group))
        elif len(group) == 1:
            rows = sum_of(share.rows() for _, share in pairs)
            self._add(Dense(rows, pairs[0][1].shape), total, list(group))
        else:
            self._add_rows(list(group), total)

    def _add_pulled(self, total: Accumulator) -> None:
        if self._plan.derived:
            self._add_rows(self._plan.derived, total)

    def _add_rows(self, roots: Sequence[Place], total: Accumulator) -> None:
        """Carry rows from roots to parameters and add their Gramian there."""
        rows = {
            root: sum_of(share.rows() for share in self.shares[root]).flatten(0, 1)
            for root in dict.fromkeys(roots)
            if root in self.shares
        }
        if not rows:
            return
        for leaf, found in pull_rows(self.graph, self._plan, rows, self._memory).items():
            if leaf in self._hooked:
                found = self._finished[leaf] = _through_hooks(self.graph.wanted[leaf], found)
            sizes = self.objectives.tasks, self.objectives.samples
            by_task = found.reshape(*sizes, *found.shape[1:])
            self._add(Dense(by_task, self.graph.wanted[leaf].shape), total, [(leaf, 0)])

    # -- the weighted gradient ---------------------------------------------------------------------

    def weighted(
        self, weights: Tensor, *, retain_graph: bool, wide: bool = False
    ) -> dict[Tensor, Tensor]:
        """
        Gradients of the weighted losses, after :meth:`gramian` with ``keep``.

        :param weights: One entry per loss, in their order.
        :param retain_graph: Whether the graph is needed afterwards.
        :param wide: Whether to sum in float64, as :func:`jdcore.linalg.rounding_shows` advises.
        :returns: Gradient by tensor, in its dtype.
        """
        # First of all what needs operations called, while the graph is there.
        with torch.no_grad(), without_autocast(self._device.type):
            wide = wide or any(t.dtype == torch.float64 for t in self.graph.targets.values())
            placed = factors(weights, self._device, wide=wide)
            gradients = self._at_targets(self.objectives.by_task(placed))
        # An ordinary pass knows whether the gradient of what no loss depends on is zero, or none.
        left = [self.graph.targets[place] for place in self._plan.left]
        gradients.update(self._differentiated([*self._others(), *left], weights, retain_graph))
        return gradients

    def differentiated(self, weights: Tensor, *, retain_graph: bool) -> dict[Tensor, Tensor]:
        """:meth:`weighted` by an ordinary backward pass, which needs nothing that was kept."""
        tensors = [*self.graph.targets.values(), *self._others()]
        return self._differentiated(tensors, weights, retain_graph)

    def _differentiated(
        self, tensors: list[Tensor], weights: Tensor, retain_graph: bool
    ) -> dict[Tensor, Tensor]:
        if not tensors:
            return {}
        outputs, seeds = self.objectives.differentiable(), self.objectives.seeds(weights)
        with self.fields_unchanged():
            found = differentiate(outputs, tensors, seeds, retain_graph)
        return {tensor: g for tensor, g in zip(tensors, found, strict=True) if g is not None}

    def _others(self) -> list[Tensor]:
        return [*(self.graph.others if self._all_leaves else ()), *self.graph.retained]

    def _at_targets(self, by_task: Tensor) -> dict[Tensor, Tensor]:
        graph, grads = self.graph, self._small.weighted(by_task)
        for root, found in self._of_alike(by_task):
            grads[root] = grads[root] + found if root in grads else found
        for root in sorted(self.shares, key=self._growth):
            shares = self.shares.pop(root)
            of_uses = [share.weighted(by_task) for share in shares]
            if root in grads:
                of_uses.append(grads[root])
            grads[root] = sum_of(of_uses) if len(of_uses) > 1 else of_uses[0]
        final = {
            graph.targets[place]: grads.pop(place).to(graph.form.result(place).dtype)
            for place in self._plan.ordinary
            if place in grads
        }
        for leaf, grad in pull(graph, self._plan, grads).items():
            final[graph.leaves[leaf]] = grad
        for leaf, rows in self._finished.items():
            tensor = graph.wanted[leaf]
            share = Dense(rows[None], tensor.shape)
            final[tensor] = share.weighted(by_task.reshape(1, -1)).to(tensor.dtype)
        return final

    def _growth(self, root: Place) -> int:
        """How many entries more there are once the weighted gradient of a root is there."""
        held = sum(share.entries for share in self.shares[root])
        return self.graph.form.result(root).shape.numel() - held

    def _of_alike(self, by_task: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Weighted gradients of layers of one form, which accelerators compute together."""
        alike: dict[Hashable, list[Place]] = {}
        for root, [share, *others] in self.shares.items():
            kind = None if self._memory.reused or others else share.alike
            if kind is not None:
                alike.setdefault(kind, []).append(root)
        largest = self._memory.joined
        room = largest // 8
        for roots in alike.values():
            while len(roots) > 1:
                # Copied are the factors of layers that are small or that others made room for.
                entries = self.shares[roots[0]][0].entries
                count = max(1, min(room, largest) // max(1, entries))
                some, roots = roots[:count], roots[count:]
                room += len(some) * entries
                shares = [self.shares.pop(root)[0] for root in some]
                yield from zip(some, shares[0].weighted_together(shares, by_task), strict=True)


def _made(rule: Rule | None, site: Site, operand: int) -> Share | None:
    if rule is None:
        return None
    try:
        return rule(site, operand)
    except (NoRule, Unreadable):
        return None


_Entry: TypeAlias = "tuple[Place, torch.Size]"


class _Small:
    """Short rows of many parameters, multiplied together."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._waiting = Waiting[tuple[Place, Sums]](memory, self._put_together, attrgetter("kind"))
        self._groups: dict[tuple[torch.dtype, bool], list[tuple[list[_Entry], Tensor]]] = {}
        self._joined: list[tuple[Tensor, list[_Entry]]] = []

    def add(self, root: Place, share: Dense, counted: bool = False) -> None:
        """
        Add the rows of a share.

        :param root: Where the gradient belongs.
        :param counted: Whether their Gramian is in that of another share.
        """
        waits = isinstance(share, Sums) and not counted and self._waiting.take(share, (root, share))
        if not waits:
            self._put([(root, share.shape)], share.flat_rows(), counted)

    def _put(self, entries: list[_Entry], rows: Tensor, counted: bool) -> None:
        self._groups.setdefault((rows.dtype, counted), []).append((entries, rows))

    def _put_together(self, pairs: list[tuple[Place, Sums]]) -> None:
        rows = Sums.rows_together([share for _, share in pairs])
        self._put([(root, share.shape) for root, share in pairs], rows, False)

    def shares(self, keep: bool) -> Iterator[tuple[Dense, list[Place]]]:
        """
        What is to be added to the Gramian, and the roots whose rows it is made of.

        :param keep: Whether :meth:`weighted` will be called.
        """
        self._waiting.finish()
        for (_, counted), parts in self._groups.items():
            if counted and not keep:
                continue
            if counted and self._memory.reused:
                # Joined rows would be a copy, which costs more here than calls do.
                self._joined += [(rows, entries) for entries, rows in parts]
                continue
            rows = [of_roots for _, of_roots in parts]
            joined = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
            entries = [entry for of_rows, _ in parts for entry in of_rows]
            if not counted:
                yield Dense(joined, joined.shape[2:]), [root for root, _ in entries]
            if keep:
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


def _through_hooks(leaf: Tensor, rows: Tensor) -> Tensor:
    """What the hooks of a parameter make of each row, as in a backward pass of its own."""
    changed = [through_tensor_hooks({leaf: row})[leaf] for row in rows.to(leaf.dtype)]
    return torch.stack(changed)


def _row(grad: Tensor | None) -> Tensor | None:
    """The gradient of one task."""
    if grad is None:
        return None
    if grad.requires_grad:  # which it does where somebody differentiates twice
        grad = grad.detach()
    return dense(grad)[None]


def _joined(first: Tensor | None, last: Tensor | None, tasks: int) -> Tensor | None:
    """
    The gradients of all tasks at a place, zero where there is none.

    :param first: Of all but the last, shape [K - 1, ...].
    :param last: Of the last one.
    :param tasks: K.
    """
    row = _row(last)
    if row is None:
        return None if first is None else torch.cat([first, torch.zeros_like(first[:1])])
    return torch.cat([row.new_zeros(tasks - 1, *row.shape[1:]) if first is None else first, row])
