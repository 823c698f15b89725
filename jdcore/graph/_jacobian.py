from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jdcore._fields import disjoint
from jdcore.errors import JDCoreError, RowByRowWarning, UnservedGraphError, warn
from jdcore.graph._cancelling import multiplied
from jdcore.graph._functions import (
    kept_leaves,
    refused_tampering,
    returning_copies,
    tampers,
    try_functions,
)
from jdcore.graph._graph import Graph, Place
from jdcore.graph._hooks import has_hook_for_several, may_have_hooks
from jdcore.graph._memory import Memory
from jdcore.graph._objectives import Objectives, OneByOne
from jdcore.graph._operations import is_sparse
from jdcore.graph._passes import Heard, Listener, detached, differentiate
from jdcore.graph._plan import Plan, Plans, plan_of_tasks
from jdcore.graph._probe import Unshown
from jdcore.graph._root_shares import RootShares
from jdcore.graph._saved import all_saved, function_of
from jdcore.graph._serving import Serving
from jdcore.graph._site import Site
from jdcore.graph._tasks import Passes, Starts, starts_of
from jdcore.graph._walk import REENTRANT
from jdcore.graph.rules import Rules
from jdcore.graph.shares import Accumulator, Dense
from jdcore.linalg import factors

_HOOKED = (
    "there are hooks that were made since the last call, and torch does not show whether they are "
    "on tensors of this graph"
)

_TAMPERED = "a function writes into the gradients that its backward is given"


class Jacobian:
    """
    The Jacobian of some losses, as shares at the roots of parameters.

    Its methods are called where :func:`~jdcore._modes.plain_modes` holds.

    :param objectives: The losses.
    :param wanted: The parameters.
    :param plans: What is known of graphs of this kind.
    :param rules: What is known of operations.
    :param budget: Bytes that a temporary may have; None lets the library choose.
    :param all_leaves: Whether weighted gradients are wanted for all leaves behind the losses.
    :param report: Whether to note what served each operand.
    :raises UnservedGraphError: If it cannot be right.
    """

    def __init__(
        self,
        objectives: Objectives,
        wanted: Sequence[Tensor],
        plans: Plans,
        *,
        rules: Rules,
        budget: int | None = None,
        all_leaves: bool = False,
        report: bool = False,
    ) -> None:
        self._report = report
        self._plans, self._rules = plans, rules
        self._all_leaves = all_leaves
        self.graph = Graph(objectives.walk, wanted)
        # That of the parameters: losses may have been brought to the host.
        self._device = next(iter(self.graph.targets.values()), objectives.outputs[0]).device
        self.memory = Memory.of(self._device, budget, objectives.outputs[0].dtype)
        self._given = [tensor for tensor in wanted if tensor.is_leaf]
        # Torch has no public way to ask whether a tensor has hooks.
        hooked = {i for i, leaf in self.graph.leaves.items() if leaf._backward_hooks}
        self._hooked = hooked & self.graph.wanted.keys()
        inner = [*self.graph.targets.values(), *self.graph.retained]
        self._single_passes = bool(hooked or [tensor for tensor in inner if not tensor.is_leaf])
        """Whether somebody hears the gradients of passes, who must not meet several in one."""
        self.objectives = objectives
        self.one_by_one: str | None = None
        """Why each loss gets a backward pass of its own, if that is so in spite of samples."""
        if REENTRANT in self.graph.form.names:
            self._refuse_reentrant()
        if hooked:
            self._refuse_hooks_for_several(hooked if all_leaves else self._hooked)
        if may_have_hooks(self.graph):
            self._take_plain_rows(_HOOKED)
        elif self._hooked and (reason := self._reason_of_hooks()):
            self._take_plain_rows(reason)
        elif tampers(self.graph):
            self._take_plain_rows(_TAMPERED)
        self._found: Plan | None = None
        self.roots: RootShares | None = None
        """Once they were made, the shares."""
        self.definite = False
        """Whether the Gramian has shown that no combination of its rows nearly vanishes."""

    @property
    def changed(self) -> list[Tensor]:
        """The tensors whose ``.grad`` a step writes, but for those that retain it."""
        graph = self.graph
        return list((graph.leaves if self._all_leaves else graph.targets).values())

    def goes_one_by_one(self) -> bool:
        """Whether each loss gets a backward pass of its own, which may show in the first ones."""
        with torch.no_grad(), self.fields_unchanged():
            self._plan  # noqa: B018 - to look for it may show this
        return self.one_by_one is not None

    def _refuse_reentrant(self) -> None:
        names = self.graph.form.names
        hiding = [self.graph.nodes[i] for i, name in enumerate(names) if name == REENTRANT]
        raise UnservedGraphError(
            "a reentrant checkpoint",
            "it hides the operations and the parameters inside it",
            "Call torch.utils.checkpoint.checkpoint with use_reentrant=False.",
        ).at(kept_leaves(hiding[:1]))

    def _refuse_hooks_for_several(self, hooked: Iterable[int]) -> None:
        # Torch tells these hooks only of leaves that a pass accumulates into, and ours accumulate
        # into none.
        leaves = [self.graph.leaves[leaf] for leaf in hooked]
        if hearing := [leaf for leaf in leaves if has_hook_for_several(leaf, "all")]:
            raise UnservedGraphError(
                "a hook of register_multi_grad_hook on parameters",
                "it hears only of gradients that are accumulated",
                "Remove it for this step, or use jdcore.autojac.backward and jac_to_grad.",
            ).at(hearing)

    def _reason_of_hooks(self) -> str | None:
        """Why hooks of parameters need a backward pass for each loss, if they do."""
        if any(has_hook_for_several(self.graph.wanted[i], "any") for i in self._hooked):
            return "a parameter has a hook that hears of one gradient in a pass"
        if any(map(is_sparse, self.graph.form.names, self.graph.nodes)):
            return "a hook of a parameter may be meant for sparse gradients"
        return None

    # -- the Gramian -------------------------------------------------------------------------------

    def gramian(self, *, keep: bool, retain_graph: bool) -> Tensor:
        """
        The Gramian of the flattened losses, float64 [m, m].

        :param keep: Whether :meth:`weighted` will be called.
        :param retain_graph: Whether the graph is needed afterwards.
        """
        rows, precision = self.objectives.rows, self.graph.form.precision
        if rows == 0:
            return torch.zeros(0, 0, dtype=torch.float64, device=self._device)
        made: list[Accumulator] = []

        def added_up() -> tuple[Tensor, bool]:
            if made:
                self.memory.widen()
            total = Accumulator(rows, self._device, keep, self.memory)
            if made and keep:
                with torch.no_grad():  # the same shares once more
                    for share in made[0].added:
                        total.add_share(share)
            else:
                # Without what is kept, all may have to be done once more.
                again = not (made or keep) and precision != torch.float64
                self.add_to(total, retain_graph=retain_graph or again)
            made.append(total)
            return total.result()

        found, self.definite = multiplied(rows, precision, added_up)
        return self.objectives.ordered(found)

    def add_to(self, total: Accumulator, *, retain_graph: bool) -> None:
        """
        Add the shares of all parameters to a Gramian.

        :param total: Of the rows in the order [K, B].
        :param retain_graph: Whether the graph is needed afterwards.
        """
        with torch.set_grad_enabled(False):  # half of the calls of torch.no_grad()
            with self.fields_unchanged():
                plan = self._plan
                self.memory.suit(self.objectives.tasks * plan.size)
                given = self.graph, self.objectives, plan, self._hooked, self.memory, total
                self.roots = RootShares(*given, report=self._report)
                serving = Serving(self.graph, plan, self._rules, self.memory, self.roots)
                # Passes that end at parameters leave nothing that could be written to.
                plain = isinstance(self.objectives, OneByOne) or not self.graph.functions_of_others
                with nullcontext() if plain else refused_tampering(self.graph):
                    if self._without_samples:
                        self._run_tasks(serving, total.keep, retain_graph)
                    else:
                        self._run(serving, retain_graph)
            self.roots.finish()

    @property
    def _without_samples(self) -> bool:
        return self.objectives.batch_dim is None or self.objectives.samples == 1

    def _take_plain_rows(self, reason: str) -> None:
        """Give each loss a backward pass of its own: only that runs hooks as they are meant."""
        if not self._without_samples:
            self.one_by_one = reason
            warn(RowByRowWarning(self.objectives.rows, reason))
        self.objectives = OneByOne(self.objectives.outputs, self.objectives.batch_dim)
        self._single_passes = True
        self._hooked = set(self.graph.wanted)
        for known in ("_of_tasks", "_starts"):  # they are others now
            self.__dict__.pop(known, None)

    @property
    def _plan(self) -> Plan:
        """What is known of the graph. To find it may take passes."""
        # A cached_property of Python 3.11 holds a lock of all threads while its value is found:
        # passes would wait for others that ask for theirs, and the child of a fork for ever.
        if self._found is None:
            self._found = self._find_plan()
        return self._found

    def _find_plan(self) -> Plan:
        if self.graph.functions_of_others and not isinstance(self.objectives, OneByOne):
            try_functions(self.graph, self.objectives.outputs)
            if tampers(self.graph):
                self._take_plain_rows(_TAMPERED)
        objectives, batch_dim = self.objectives, self.objectives.batch_dim
        if not self._without_samples and batch_dim is not None:
            output = objectives.outputs[0]
            try:
                return self._plans.find(self.graph, output, batch_dim, self._hooked, self._rules)
            # An error that says what to do about a graph is not a sign of a function that stops at
            # NaN.
            except JDCoreError:
                raise
            except Unshown as reason:
                self._take_plain_rows(str(reason))
            except Exception:
                # A function that stops at NaN does not show where the samples are.
                if not any(function_of(node) for node in self.graph.nodes):
                    raise
                self._take_plain_rows("a function of the graph fails where gradients are NaN")
        return self._of_tasks

    @cached_property
    def _of_tasks(self) -> Plan:
        given = self.graph, self.objectives.rows, self._hooked
        return plan_of_tasks(*given, self._starts.alone)

    @cached_property
    def _starts(self) -> Starts:
        """Where losses without samples start."""
        return starts_of(self.graph, self.objectives)

    @cached_property
    def _kept(self) -> list[Tensor]:
        """Further leaves that functions of others know of."""
        return [*self.graph.leaves.values(), *kept_leaves(self._functions)]

    @cached_property
    def _functions(self) -> list[Any]:
        """The functions of others in the graph, and of Python."""
        nodes = self.graph.nodes if self.graph.form.has_functions else []
        return [node for node in nodes if function_of(node)]

    @contextmanager
    def fields_unchanged(self) -> Iterator[None]:
        """
        Leave every ``.grad`` as it is, also of tensors that retain it, and what passes return.

        :raises UnservedGraphError: At the end, if a function accumulates into ``.grad`` in its
            backward, unseen by the graph.
        """
        tensors = [t for t in self.graph.targets.values() if not t.is_leaf]  # they retain it
        tensors += self.graph.retained
        kept = len(tensors)
        # Only the backward of such a function can accumulate into parameters behind torch's back.
        if self.graph.form.has_functions:
            tensors += self._given + self._kept
        if not tensors:  # then there are no functions either
            yield
            return
        before = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            # Where there is no gradient, nothing can be added to one in place, and a new one shows.
            tensor.grad = None
        try:
            # Those of compiled regions as well, which may be captured graphs: what several passes
            # return is kept.
            with returning_copies(self._functions):
                yield
            hidden = [tensor for tensor in tensors[kept:] if tensor.grad is not None]
        finally:
            for tensor, grad in zip(tensors, before, strict=True):
                tensor.grad = grad
        if hidden:
            raise UnservedGraphError(
                "a function whose backward accumulates into .grad",
                "it does not return all gradients, as in a reversible block",
                "Use functions that return the gradients of their parameters, or "
                "jdcore.autojac.backward with all parameters as `inputs`, and jac_to_grad.",
            ).at(hidden)

    def _run(self, serving: Serving, retain_graph: bool) -> None:
        """All tasks, with samples."""
        plan, tasks = self._plan, self.objectives.tasks
        # Nodes without a rule are called afterwards, and other leaves differentiated.
        retain_graph |= bool(self._others()) or bool(plan.left)
        retain_graph |= plan.called is None or bool(plan.called)
        # So may be others, as a rule of a plugin may hold for some data only.
        retain_graph |= len(plan.late) < len(plan.frontier)
        serving.roots.graph_stays = retain_graph
        unserved: dict[int, tuple[Site, list[int]]] = {}
        several = tasks == 1 and serving.roots.joins and plan.some_alike

        def receive(heard: Iterable[Heard]) -> None:
            for node, grads, tensors in serving.serve_alike(heard) if several else heard:
                found = serving.serve(node, grads, tensors)
                if found is not None:
                    unserved[node] = found

        saved, results = self._saved_if_small(), self.graph.form.results
        if saved is None:
            self._listen(receive, retain_graph)
        else:  # after passes without any hook
            grads = self._of_first(tasks, retain_graph)
            receive(
                (n, [grads.pop((n, i), None) for i in range(len(results[n]))], saved.pop(n))
                for n in list(saved)
            )
        for node, (site, rest) in unserved.items():
            serving.call(node, site, rest)
        plan.called = {*(plan.called or ()), *unserved}

    def _saved_if_small(self) -> dict[int, Mapping[str, Any]] | None:
        """What the frontier saved, if the gradients there may wait until passes have freed it."""
        plan, found = self._plan, dict[int, Mapping[str, Any]]()
        small = self.objectives.tasks * plan.size <= self.memory.waiting
        if len(plan.late) < len(plan.frontier) or not small:
            return None
        for node in plan.frontier:
            tensors = all_saved(self.graph.nodes[node])
            if tensors is None:  # Python code makes some of it
                return None
            found[node] = tensors
        return found

    def _listen(self, receive: Callable[[Iterable[Heard]], None], retain_graph: bool) -> None:
        """Hear the gradients of the last task, so that nothing of it need be kept, with others."""
        objectives, plan = self.objectives, self._plan
        tasks = objectives.tasks
        first = self._of_first(tasks - 1, True) if tasks > 1 else {}

        def joined(heard: Iterable[Heard]) -> Iterator[Heard]:
            for node, grads, tensors in heard:
                of_first = [first.pop((node, i), None) for i in range(len(grads))]
                rows = [_joined(f, g, tasks) for f, g in zip(of_first, grads, strict=True)]
                yield node, rows, tensors
                del grads, rows  # freed before the next ones come

        listener = Listener(self.graph, plan.frontier, late=plan.late, room=self.memory.waiting)
        listener.run(
            objectives.outputs,
            [objectives.seeds_of_tasks([tasks - 1])[0]],
            lambda heard: receive(joined(heard)),
            retain_graph=retain_graph,
        )
        # What is left arrived from earlier tasks alone: the last one does not reach these nodes.
        left = dict.fromkeys(node for node, _ in first)
        receive(joined((n, [None] * len(self.graph.form.results[n]), {}) for n in left))

    def _of_first(self, count: int, retain_graph: bool) -> dict[Place, Tensor]:
        """The gradients of the first tasks at the operations of the frontier, [count, ...] each."""
        graph, objectives = self.graph, self.objectives
        places, found = self._plan.places, dict[Place, Tensor]()
        if count == 1:
            seed = objectives.seeds_of_tasks([0])[0]
            single = differentiate(objectives.outputs, graph.edges(places), [seed], retain_graph)
            for place, grad in zip(places, single, strict=True):
                if grad is not None:
                    found[place] = detached(grad)[None]
            return found
        [start] = graph.form.starts
        # Those of all tasks at once if they are small, as each costs some calls.
        small = count * objectives.rows <= self.memory.waiting
        whole = objectives.seeds_of_tasks(range(count)) if small else None

        def seeds(place: Place, tasks: Sequence[int]) -> Tensor:
            if whole is None:
                return objectives.seeds_of_tasks(tasks)
            return whole[tasks[0] : tasks[-1] + 1]

        passes = Passes(graph, [start] * count, seeds, self.memory, self._single_passes)
        of_places = passes.gradients(places, retain_graph=retain_graph)
        return {p: grads for p, grads in zip(places, of_places, strict=True) if grads is not None}

    def _run_tasks(self, serving: Serving, keep: bool, retain_graph: bool) -> None:
        """All tasks, without samples: ordinary gradients, beside shares of products."""
        plan, graph = self._plan, self.graph
        starts = self._starts
        alone = {place for place in plan.ordinary if place[0] in starts.alone}
        passes = Passes(graph, starts.places, starts.seeds, self.memory, self._single_passes)
        # What operations saved is read afterwards, and other leaves differentiated.
        retain_graph |= bool(self._others()) or bool(plan.frontier)
        groups = [plan.ordinary] if keep else self._groups(plan.ordinary)
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            products = list(plan.frontier) if last else []
            places = [*group, *((node, 0) for node in products)]
            retain = retain_graph or not last
            grads = passes.gradients(places, retain_graph=retain, alone=alone)
            for place, of_place in zip(group, grads, strict=False):
                if of_place is not None:
                    plan.alone.add(place)
                    loss = starts.alone.get(place[0])
                    rows = of_place[:, None] if loss is None else of_place[None, None]
                    share = Dense(rows, rows.shape[2:])
                    given = [place], share, "a parameter", "ordinary gradients"
                    serving.roots.take(*given, only=loss)
            for node in reversed(products):
                serving.serve(node, [grads.pop()], {})

    def _groups(self, places: list[Place]) -> list[list[Place]]:
        """Such that the rows of a group are not larger than allowed, or than those of one place."""
        sizes = [*map(self._entries, places)]
        # A place whose rows alone exceed the limit makes a group of its own.
        largest = max([self.memory.held, *sizes])
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
        return sum(map(self._entries, self._of_tasks.ordinary)) > self.memory.held

    def _entries(self, place: Place) -> int:
        """Of the rows at a place, without samples."""
        rows = 1 if place[0] in self._starts.alone else self.objectives.rows
        return rows * self.graph.form.result(place).shape.numel()

    def plain_rows(self) -> dict[Tensor, Tensor]:
        """
        The rows of every tensor in the graph, by a backward pass for each loss. The graph is kept.

        :returns: Shape [R, n] each, in the order [K, B].
        """
        graph, rows = self.graph, self.objectives.rows
        starts = self._starts
        passes = Passes(graph, starts.places, starts.seeds, self.memory, single=True)
        found: Sequence[Tensor | None] = [None] * len(graph.targets)
        if rows:
            with torch.no_grad(), self.fields_unchanged():
                found = passes.gradients(list(graph.targets), retain_graph=True)
        return {
            t: t.new_zeros(rows, t.numel()) if g is None else g.reshape(rows, -1)
            for t, g in zip(graph.targets.values(), found, strict=True)
        }

    # -- the weighted gradient ---------------------------------------------------------------------

    def weighted(
        self, weights: Tensor, *, retain_graph: bool, wide: bool = False
    ) -> dict[Tensor, Tensor]:
        """
        Gradients of the weighted losses, after :meth:`gramian` with ``keep``.

        :param weights: One entry per loss, in their order, on any device.
        :param retain_graph: Whether the graph is needed afterwards.
        :param wide: Whether to sum in float64, as :func:`jdcore.linalg.rounding_shows` advises.
        :returns: Gradient by tensor, in its dtype.
        """
        # First of all what needs operations called, while the graph is there.
        with torch.set_grad_enabled(False):
            wide = wide or torch.float64 in [t.dtype for t in self.graph.targets.values()]
            placed = factors(weights, self._device, wide=wide)
            assert self.roots is not None  # see above
            gradients = self.roots.weighted(self.objectives.by_task(placed))
        # An ordinary pass knows whether the gradient of what no loss depends on is zero, or none.
        others = self._others() + [self.graph.targets[place] for place in self._plan.left]
        gradients.update(self._differentiated(others, weights, retain_graph))
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
        # What a hook hands out may be a buffer of its own, which must not become a `.grad`.
        given = {
            tensor: g.clone() if self._single_passes or tensor._backward_hooks else g
            for tensor, g in zip(tensors, found, strict=True)
            if g is not None
        }
        # Two leaves may have got the same tensor, as both terms of a sum do, or that of the weights
        # themselves, which may be a field of who gave them.
        return dict(zip(given, disjoint(given.values(), seeds), strict=True))

    def _others(self) -> list[Tensor]:
        return [*(self.graph.others if self._all_leaves else ()), *self.graph.retained]


def _joined(first: Tensor | None, last: Tensor | None, tasks: int) -> Tensor | None:
    """
    The gradients of all tasks at a place, zero where there is none.

    :param first: Of all but the last, shape [K - 1, ...].
    :param last: Of the last one.
    :param tasks: K.
    """
    if last is None:
        return None if first is None else torch.cat([first, torch.zeros_like(first[:1])])
    row = detached(last)[None]
    if tasks == 1:
        return row
    return torch.cat([row.new_zeros(tasks - 1, *row.shape[1:]) if first is None else first, row])
