from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore.autojac._gradients import as_matrix
from jdcore.autojac.transform._base import Transform, Values
from jdcore.distributed._passes import Pass, run_passes
from jdcore.distributed._sharding import like, local_part, rows_like


class ShardedJac(Transform):
    """
    :class:`Jac` for leaves of which each process holds a part.

    Values of shape ``[m, *S_output]`` become DTensors of shape ``[m, *S_input]``, divided as the
    input is, of the mean over the processes that have batches of their own.

    :param outputs: Keys needed.
    :param inputs: Keys given: leaves, those under FSDP2 in the form that optimizers know.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    """

    def __init__(
        self, outputs: Iterable[Tensor], inputs: Iterable[Tensor], *, retain_graph: bool = False
    ) -> None:
        super().__init__(needs=outputs, gives=inputs)
        self.retain_graph = retain_graph

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        m = len(next(iter(values.values())))
        rows = empty_rows(self.gives, m)
        run_passes(
            [_row(values, i) for i in range(m)],
            self.gives,
            self.retain_graph,
            lambda row, place, gradient: rows[place][row].copy_(gradient),
        )
        pairs = zip(self.gives, rows, strict=True)
        return {key: rows_like(key, part) for key, part in pairs}


class ShardedTasks(Transform):
    """
    Gradients of tasks for leaves of which each process holds a part, as :class:`PerTask`.

    :param outputs: Keys needed: one loss per task.
    :param rows: Keys given, with one row per task.
    :param tasks: Per task, keys given of which the task has a gradient of its own; a key of several
        tasks gets the sum.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        rows: Sequence[Tensor],
        tasks: Sequence[Sequence[Tensor]],
        *,
        retain_graph: bool = False,
    ) -> None:
        self.rows = tuple(rows)
        self.tasks = tuple(frozenset(task) for task in tasks)
        super().__init__(outputs, [*rows, *(key for task in tasks for key in task)])
        self.retain_graph = retain_graph

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        rows = empty_rows(self.rows, len(values))
        private = self.gives[len(self.rows) :]
        sums = [local_part(key).new_zeros(local_part(key).shape) for key in private]

        def collect(task: int, place: int, gradient: Tensor) -> None:
            if place < len(rows):
                rows[place][task].copy_(gradient)
            elif self.gives[place] in self.tasks[task]:
                sums[place - len(rows)].add_(gradient)

        passes = [Pass([loss], [value]) for loss, value in values.items()]
        run_passes(passes, self.gives, self.retain_graph, collect)
        jacobians = {key: rows_like(key, part) for key, part in zip(self.rows, rows, strict=True)}
        gradients = {key: like(key, part) for key, part in zip(private, sums, strict=True)}
        return jacobians | gradients


def empty_rows(tensors: Sequence[Tensor], m: int) -> list[Tensor]:
    """Zeros for m rows of what this process holds of each tensor."""
    parts = [local_part(tensor) for tensor in tensors]
    return [part.new_zeros(m, *part.shape) for part in parts]


def _row(cotangents: dict[Tensor, Tensor], row: int) -> Pass:
    """The pass of one row, from those outputs that it does not multiply by zero."""
    used = {output: c[row] for output, c in cotangents.items() if bool(as_matrix(c)[row].any())}
    return Pass(list(used), list(used.values()))
