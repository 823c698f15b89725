from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor

from jdcore._fields import check_grads
from jdcore.aggregation._nested_state import state_kept
from jdcore.aggregation._source import check_losses, taken_by
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Meeting, Stage
from jdcore.distributed._replicated import weights_of_first
from jdcore.distributed._sharded import ShardedColumns
from jdcore.distributed._sharding import copied, divided, like, local_part
from jdcore.distributed._step import (
    LocalRows,
    Losses,
    Update,
    Whole,
    divides,
    mean_losses,
    promoted,
    start,
)
from jdcore.protocols import Aggregator


@frozen(eq=False)
class Shards:
    """
    Parameters that are divided among processes: under FSDP2, or by tensor parallelism.

    :param grid: How the processes hold the tensors.
    :param given: The tensors that are aggregated.
    """

    grid: Grid
    given: Sequence[Tensor]

    @staticmethod
    def of(given: Sequence[Tensor]) -> Shards:
        """The tensors with the processes that hold them."""
        return Shards(Grid.of(given), given)

    def aggregate(
        self,
        local: Callable[[], LocalRows],
        aggregator: Aggregator,
        losses: Losses,
        whole: Whole,
    ) -> Update:
        """
        Aggregate a Jacobian whose columns are divided among processes.

        :param local: Checks and gives what this process has: the rows of its parts.
        :param aggregator: The aggregator, the same on all processes.
        :param losses: Values of the objectives on this process, if they are known.
        :param whole: Aggregates blocks within this process.
        :raises ParameterError: If what the processes have does not fit together.
        :raises PeerError: If another process could not make the step.
        """
        device = self.given[0].device
        with state_kept(aggregator), Meeting(self.grid.groups, device) as meeting:
            own = local()
            rows, _ = start(
                meeting, own, aggregator, partial(self._layout, own), losses is not None
            )
            values = mean_losses(meeting, check_losses(losses, rows))
            # The same on all processes: which tensors have rows is a part of the layout.
            targets = list(own.matrices)
            check_grads(targets)
            second = None if own.second is None else [own.second[t] for t in targets]
            matrices = list(own.matrices.values())
            if divides(aggregator):
                columns = ShardedColumns(meeting, self.grid, targets, matrices, second)
                call: Any = aggregator
                known = taken_by(call.aggregate_columns, losses=values)
                parts, weights = call.aggregate_columns(columns, **known)
            else:
                parts, weights = _whole(meeting, targets, own, aggregator, values, whole)
            gradients = {
                target: like(target, part.view(local_part(target).shape))
                for target, part in zip(targets, parts, strict=True)
            }
            check_grads(gradients)  # again: the aggregator may have changed them
        return Update(gradients, weights=promoted(weights, matrices))

    def _layout(self, own: LocalRows, by_numbers: bool) -> list[object]:
        del by_numbers  # placements are the same on all processes
        return [
            (t in own.matrices, tuple(t.shape), t.dtype, str(getattr(t, "placements", None)))
            for t in self.given
        ]


def _whole(
    meeting: Meeting,
    targets: Sequence[Tensor],
    own: LocalRows,
    aggregator: Aggregator,
    losses: Tensor | None,
    whole: Whole,
) -> tuple[list[Tensor], Tensor | None]:
    """Give the whole matrix to each process, and to each its part of the result."""
    blocks = [copied(meeting, target, own.matrices[target]) for target in targets]
    second = None
    if own.second is not None:
        second = [copied(meeting, target, own.second[target]) for target in targets]
    vectors, weights = whole(aggregator, blocks, losses, second)
    # What draws random numbers need not come to the same on all processes.
    if weights is not None:
        weights = weights_of_first(meeting, weights, blocks[0].device)
    first = [meeting.from_first(Stage.UPDATE, vector) for vector in vectors]
    return [divided(t, v) for t, v in zip(targets, first, strict=True)], weights
