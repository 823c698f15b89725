from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore._fields import check_fits, disjoint
from jdcore.autojac._gradients import filled
from jdcore.autojac._problem import Problem
from jdcore.autojac.transform._base import Transform, Values, describe_keys
from jdcore.graph import Reach, edge_of
from jdcore.graph._hooks import hooks_made_lately
from jdcore.graph._nesting import Exit, leaving
from jdcore.graph._walk import Edge


class PerTask(Transform):
    """
    Run one transform per task and put their gradients together.

    A key in ``rows`` becomes a Jacobian with one row per task (zeros where a task does not give the
    key); any other key becomes the sum over the tasks that give it.

    :param tasks: One transform per task, in the order of the rows.
    :param rows: Keys of which each task has its own row.
    """

    def __init__(self, tasks: Sequence[Transform], rows: Iterable[Tensor]) -> None:
        self.tasks = tuple(tasks)
        self.rows = tuple(rows)
        given = [key for task in self.tasks for key in task.gives]
        super().__init__([key for task in self.tasks for key in task.needs], [*self.rows, *given])

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        m = len(self.tasks)
        rows = {key: _zeros(m, key) for key in self.rows}
        # All views at once: to index each row would take as many calls as there are rows. By
        # identity, as the hash of a tensor is a function of Python.
        places = {id(key): row.unbind() for key, row in rows.items()}
        sums: dict[int, Tensor] = {}
        fitting: set[int] = set()
        for i, task in enumerate(self.tasks):
            own, found = [], []
            # One task after the other, so that the gradients of one at a time are alive beside the
            # rows, and copied before the next pass: a hook may hand out the same buffer again.
            for key, value in task(values).items():
                number = id(key)
                if number in places:
                    if number not in fitting:  # shapes are those of the first task that gives it
                        check_fits(value.shape, key)
                        fitting.add(number)
                    own.append(places[number][i])
                    found.append(value)
                elif number in sums:
                    sums[number].add_(value)
                else:
                    # A gradient can share its memory with another one (as those of a + b do), or
                    # with what it was computed from.
                    sums[number] = value.clone()
            if own:
                # One call, and on accelerators few kernels, for all of them.
                torch._foreach_copy_(own, found)
        return rows | {key: sums[id(key)] for key in self.gives if id(key) in sums}

    def __repr__(self) -> str:
        inner = "".join(f"\n  {task!r}".replace("\n>>", " >>") for task in self.tasks)
        return f"PerTask(rows of {describe_keys(self.rows)}:{inner})"


class Heads(Transform):
    """
    What :class:`PerTask` gives for tasks that have nothing in common before the features.

    One pass goes through the heads of all tasks: it takes a fraction of the calls of a pass each.

    :param losses: Keys needed: one per task.
    :param rows: Keys given with one row per task: features, at which the heads end.
    :param others: Keys given, each with its gradient: those of a single task.
    :param heads: Per task, what lies between the loss and the features.
    :param graph: All of these, which have nothing in common and hold no functions of Python.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param watched: As for :class:`Grad`.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        rows: Iterable[Tensor],
        others: Iterable[Tensor],
        heads: Sequence[Reach],
        graph: Reach,
        *,
        retain_graph: bool = False,
        watched: Iterable[Tensor] = (),
    ) -> None:
        self.rows, self.others = tuple(rows), tuple(others)
        super().__init__(losses, [*self.rows, *self.others])
        self.heads, self.graph = tuple(heads), graph
        self.retain_graph, self.watched = retain_graph, tuple(watched)

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        losses = [loss for loss in values if loss.requires_grad]
        # Zeros, as a task may not reach a feature, or reach it by several operations whose
        # gradients add up.
        rows = {key: _zeros(len(values), key) for key in self.rows}
        places = {edge_of(key): row.unbind() for key, row in rows.items()}
        exits = [
            Exit(node, task, edges)
            for task, head in enumerate(self.heads)
            for node, edges in head.last.items()
        ]

        def receive(edge: Edge, task: int, gradient: Tensor) -> None:
            places[edge][task].add_(gradient)

        # The features are asked for, so that the pass goes on to where it is listened to. Nothing
        # arrives at them.
        inputs = [*self.others, *self.rows]
        starts = [values[loss] for loss in losses]
        problem = Problem.of(losses, inputs, starts, self.graph, self.watched)
        with leaving(exits, losses, receive):
            own = filled(problem.gradients(self.retain_graph), self.others)
        # What a hook hands out may be a buffer of its own, which must not become a `.grad`.
        hooked = hooks_made_lately(self.graph.nodes) or any(
            key._backward_hooks for key in self.others
        )
        own = [gradient.clone() for gradient in own] if hooked else disjoint(own, starts)
        return rows | dict(zip(self.others, own, strict=True))

    def __repr__(self) -> str:
        return f"Heads({describe_keys(self.needs)} -> {describe_keys(self.gives)})"


def _zeros(m: int, like: Tensor) -> Tensor:
    return torch.zeros((m, *like.shape), dtype=like.dtype, device=like.device)
