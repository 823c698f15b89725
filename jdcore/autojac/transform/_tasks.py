from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore.autojac._problem import Problem
from jdcore.autojac.transform._base import Transform, Values, describe_keys
from jdcore.graph import Reach


class PerTask(Transform):
    """
    Gradients of one loss per task, from its gradient: rows for some keys, sums for the others.

    The tasks are differentiated one after the other. A key in ``rows`` becomes a Jacobian with one
    row per task, zero where the loss does not depend on it.

    :param losses: Keys needed: one per task. Those that do not require grad give zero rows.
    :param rows: Keys given with a row for each task.
    :param tasks: Per task, further keys given to whose gradient it adds.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param retained: Per task, whether a later one needs the graph that its gradient passes through,
        if it is known.
    :param graph: What lies behind the losses, if it is known.
    :param watched: Tensors among which are leaves whose ``.grad`` must not change meanwhile,
        besides those of the graph.
    """

    def __init__(
        self,
        losses: Iterable[Tensor],
        rows: Iterable[Tensor],
        tasks: Iterable[Iterable[Tensor]],
        *,
        retain_graph: bool = False,
        retained: Sequence[bool] | None = None,
        graph: Reach | None = None,
        watched: Iterable[Tensor] = (),
    ) -> None:
        self.rows, self.tasks = tuple(rows), tuple(map(tuple, tasks))
        given = [key for task in self.tasks for key in task]
        super().__init__(losses, [*self.rows, *given])
        self.retain_graph, self.retained = retain_graph, retained
        self.graph, self.watched = graph, tuple(watched)

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        rows = range(len(self.rows))
        # By identity, as the hash of a tensor is a function of Python.
        places = {id(key): i for i, key in enumerate(self.gives)}
        problem = Problem.of(
            self.needs,
            self.gives,
            [*values.values()],
            self.graph,
            self.watched,
            uses=[[k] for k in range(len(values))],
            sums=len(self.gives) - len(rows),
            asked=[[*rows, *[places[id(key)] for key in task]] for task in self.tasks],
            retained=self.retained,
            apart=True,
        )
        return dict(zip(self.gives, problem.row_by_row(self.retain_graph), strict=True))

    def __repr__(self) -> str:
        sums = describe_keys(self.gives[len(self.rows) :])
        return (
            f"PerTask({describe_keys(self.needs)} -> rows of {describe_keys(self.rows)}; "
            f"sums of {sums})"
        )
