from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore.autojac._gradients import as_matrix
from jdcore.autojac.transform._base import Transform, Values
from jdcore.autojac.transform._differentiate import Jac
from jdcore.distributed._gathering import without_hooks
from jdcore.distributed._passes import Pass, SpreadPasses, is_spread
from jdcore.distributed._sharded import check_copies
from jdcore.distributed._sharding import Gathered, is_dtensor, like, local_part, rows_like
from jdcore.graph import Reach
from jdcore.graph._memory import free_memory

# Bytes of the rows of gathered parameters, where a device does not tell how much memory it has.
_MOST_BYTES = 512 << 20
# How much of the free memory these rows may take, beside the parameters and what is sent.
_PART = 0.25


class ShardedJac(Transform):
    """
    :class:`Jac` for leaves of which each process holds a part.

    Values of shape ``[m, *S_output]`` become DTensors of shape ``[m, *S_input]``, divided as the
    input is, of the mean over the processes that have batches of their own.

    :param outputs: Keys needed.
    :param inputs: Keys given: leaves, those under FSDP2 in the form that optimizers know.
    :param whole: The same for the leaves that stand for the inputs in the graph, within one
        process; keys in the same order.
    :param chunk_size: 1 for one accumulating pass for each row, more for gathered parameters; None
        lets the library choose.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        inputs: Iterable[Tensor],
        whole: Transform,
        *,
        retain_graph: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(needs=outputs, gives=inputs)
        self.whole = whole
        self.retain_graph = retain_graph
        self.chunk_size = chunk_size

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        m = len(next(iter(values.values())))
        together = SpreadPasses([_row(values, i) for i in range(m)], self.gives)
        with together.meeting() as meeting:
            gathers = together.check(
                meeting, at_once=_at_once(self.chunk_size), fits=_fit(self.gives, m)
            )
            if gathers:
                [parts] = together.gather(meeting, lambda: [self.whole(values)])
        if not gathers:
            rows = empty_rows(self.gives, m)
            together.run(
                self.retain_graph, lambda row, place, gradient: rows[place][row].copy_(gradient)
            )
            parts = dict(zip(self.gives, rows, strict=True))
        return {key: rows_like(key, parts[key]) for key in self.gives}


def jac_of(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    graph: Reach,
    *,
    watched: Iterable[Tensor] = (),
    retain_graph: bool = False,
    chunk_size: int | None = None,
    uses: Sequence[Sequence[int]] | None = None,
) -> Transform:
    """
    :class:`Jac`, or :class:`ShardedJac` where a process holds a part only.

    :param targets: Keys given. Those under FSDP2 are in the form that optimizers know.
    """
    gathered, spread = Gathered(), is_spread(targets)
    jac = Jac(
        outputs,
        [gathered.leaf(target) for target in targets] if spread else targets,
        retain_graph=retain_graph,
        chunk_size=chunk_size,
        graph=without_hooks(graph) if spread else graph,
        watched=watched,
        uses=uses,
    )
    if not spread:
        return jac
    return ShardedJac(outputs, targets, jac, retain_graph=retain_graph, chunk_size=chunk_size)


class ShardedTasks(Transform):
    """
    Gradients of tasks for leaves of which each process holds a part, as :class:`PerTask`.

    :param outputs: Keys needed: one loss per task.
    :param rows: Keys given, with one row per task.
    :param tasks: Per task, keys given of which the task has a gradient of its own; a key of several
        tasks gets the sum.
    :param whole: The same for the leaves that stand for these in the graph, within one process.
    :param leaves: These leaves: those of the rows, and those of the tasks.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param chunk_size: As for :class:`ShardedJac`.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        rows: Sequence[Tensor],
        tasks: Sequence[Sequence[Tensor]],
        whole: Transform,
        leaves: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        retain_graph: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.tasks = tuple(frozenset(task) for task in tasks)
        super().__init__(outputs, [*rows, *(key for task in tasks for key in task)])
        self.whole, self.leaves = whole, leaves
        self.retain_graph = retain_graph
        self.chunk_size = chunk_size

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        passes = [Pass([loss], [value]) for loss, value in values.items()]
        together = SpreadPasses(passes, self.gives)
        with together.meeting() as meeting:
            gathers = together.check(
                meeting, at_once=_at_once(self.chunk_size), fits=_fit(self.rows, len(values))
            )
            if gathers:
                parts, sums = together.gather(meeting, lambda: self._whole(values))
        if not gathers:
            parts, sums = self._by_passes(together, len(values))
        self._check_copies(together, sums)
        jacobians = {key: rows_like(key, parts[key]) for key in self.rows}
        return jacobians | {key: like(key, part[0]) for key, part in sums.items()}

    def _check_copies(self, together: SpreadPasses, sums: Values) -> None:
        """Refuse plain parameters of tasks whose gradients nobody would reduce."""
        plain = {key: as_matrix(part) for key, part in sums.items() if not is_dtensor(key)}
        if plain:  # on all processes, as all have the same tensors
            with together.meeting() as meeting:
                check_copies(meeting, together.grid, [*plain], [*plain.values()], "tasks_params")

    def _whole(self, values: Values) -> tuple[Values, Values]:
        found = self.whole(values)
        rows, private = self.leaves
        return {leaf: found[leaf] for leaf in rows}, {leaf: found[leaf][None] for leaf in private}

    def _by_passes(
        self, together: SpreadPasses, m: int
    ) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        rows = empty_rows(self.rows, m)
        private = self.gives[len(self.rows) :]
        sums = empty_rows(private, 1)

        def collect(task: int, place: int, gradient: Tensor) -> None:
            if place < len(rows):
                rows[place][task].copy_(gradient)
            elif self.gives[place] in self.tasks[task]:
                sums[place - len(rows)][0].add_(gradient)

        together.run(self.retain_graph, collect)
        return dict(zip(self.rows, rows, strict=True)), dict(zip(private, sums, strict=True))


def empty_rows(tensors: Sequence[Tensor], m: int) -> list[Tensor]:
    """Zeros for m rows of what this process holds of each tensor."""
    parts = [local_part(tensor) for tensor in tensors]
    return [part.new_zeros(m, *part.shape) for part in parts]


def _row(cotangents: dict[Tensor, Tensor], row: int) -> Pass:
    """The pass of one row, from those outputs that it does not multiply by zero."""
    used = {output: c[row] for output, c in cotangents.items() if bool(as_matrix(c)[row].any())}
    return Pass(list(used), list(used.values()))


def _at_once(chunk_size: int | None) -> bool | None:
    return None if chunk_size is None else chunk_size > 1


def _fit(tensors: Sequence[Tensor], m: int) -> bool:
    """Whether there is room for m rows of whole tensors."""
    # Of the whole tensors, since each process has all of their columns for the time of the passes.
    size = m * sum(math.prod(tensor.shape) * tensor.itemsize for tensor in tensors)
    available = free_memory(tensors[0].device) if tensors else None
    return size <= (_MOST_BYTES if available is None else _PART * available)
