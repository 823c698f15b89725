from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from jdcore._fields import check_grads, dense
from jdcore.aggregation._nested_state import state_kept
from jdcore.aggregation._source import check_losses, taken_by
from jdcore.distributed._heads import check_none_left, is_local
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._names import words_of
from jdcore.distributed._replicas import parameters_of, replicas_of
from jdcore.distributed._replicated import ReplicatedColumns, weights_of_first
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
from jdcore.distributed._transfers import buckets_of, mean_rows
from jdcore.errors import ParameterError
from jdcore.protocols import Aggregator


@frozen(eq=False)
class Replicas:
    """
    Parameters that several processes keep equal, each with the Jacobian of its own batch.

    :param group: The processes.
    :param given: The tensors that are aggregated.
    :param members: These, and all others whose gradients the same modules keep equal.
    :param promised: Whether the user says that all processes have the others equal, in this order.
    """

    group: Group
    given: Sequence[Tensor]
    members: Sequence[Tensor]
    promised: bool

    @staticmethod
    def of(given: Sequence[Tensor], group: Group, promised: bool) -> Replicas:
        """The tensors with all parameters of their DistributedDataParallel modules."""
        others = [p for replica in replicas_of(given) for p in parameters_of(replica)]
        return Replicas(group, given, list(dict.fromkeys([*given, *others])), promised)

    def aggregate(
        self,
        local: Callable[[], LocalRows],
        aggregator: Aggregator,
        losses: Losses,
        whole: Whole,
    ) -> Update:
        """
        Aggregate the mean of the Jacobians of all processes.

        :param local: Checks and gives the Jacobian of this process.
        :param aggregator: The aggregator, the same on all processes.
        :param losses: Values of the objectives on this process, if they are known.
        :param whole: Aggregates blocks within this process.
        :raises ParameterError: If what the processes have does not fit together.
        :raises PeerError: If another process could not make the step.
        """
        device = self.given[0].device
        with state_kept(aggregator), Meeting([self.group], device) as meeting:
            own = local()
            check_none_left(self.members, self.group)
            rows, targets, heads = self._meet(meeting, own, (aggregator, losses is not None))
            check_grads(targets)
            values = mean_losses(meeting, check_losses(losses, rows))
            columns = ReplicatedColumns(
                meeting,
                buckets_of(targets, rows, self.group),
                [own.matrices.get(target) for target in targets],
                None if own.second is None else [own.second.get(target) for target in targets],
                rows,
            )
            vectors, weights = _aggregated(aggregator, columns, values, meeting, whole)
            pairs = zip(targets, vectors, strict=True)
            gradients = {target: vector.view(target.shape) for target, vector in pairs}
            means = self._means(meeting, heads)
            check_grads(gradients)  # again: the aggregator may have changed them
        return Update(gradients, means, promoted(weights, targets))

    def _meet(
        self, meeting: Meeting, own: LocalRows, arguments: tuple[Aggregator, bool]
    ) -> tuple[int, list[Tensor], list[Tensor]]:
        """Number of rows, tensors with a ``.jac`` anywhere, and those with a local gradient."""
        aggregator, losses = arguments
        lacks = len(own.matrices) < len(self.given) or any(map(is_local, self.members))
        count, some = start(meeting, own, aggregator, self._words, losses, lacks=lacks)
        # The usual case, in which no process has anything to add, is told without a second
        # exchange.
        if not some:
            return count, list(self.given), []
        present = [[tensor in own.matrices, is_local(tensor)] for tensor in self.members]
        flags = torch.tensor(present, dtype=torch.int64, device=meeting.device)
        found = meeting.maximum(Stage.PRESENCE, flags).tolist()
        table = list(zip(self.members, found, strict=True))
        targets = [tensor for tensor, (has_rows, _) in table if has_rows]
        return count, targets, [t for t, (has_rows, waits) in table if waits and not has_rows]

    def _words(self, by_numbers: bool) -> list[object]:
        """Words that tell lists of tensors apart, also where shapes repeat."""
        promised = self.members if self.promised else ()
        # Members begin with what is given, of which another process may have given more.
        return [len(self.given), *words_of(self.members, promised, by_numbers=by_numbers)]

    def _means(self, meeting: Meeting, heads: list[Tensor]) -> dict[Tensor, Tensor]:
        if not heads:
            return {}
        own = [_gradient(head) for head in heads]
        means = mean_rows(meeting, buckets_of(heads, 1, self.group), own, 1)
        return {head: mean.view(head.shape) for head, mean in zip(heads, means, strict=True)}


def _aggregated(
    aggregator: Any,
    columns: ReplicatedColumns,
    losses: Tensor | None,
    meeting: Meeting,
    whole: Whole,
) -> tuple[list[Tensor], Tensor | None]:
    if divides(aggregator):
        known = taken_by(aggregator.aggregate_columns, losses=losses)
        vectors, weights = aggregator.aggregate_columns(columns, **known)
        return vectors, weights
    # An aggregator of the user knows nothing of processes: each of them aggregates the whole
    # matrix.
    blocks, second = columns.whole()
    vectors, weights = whole(aggregator, blocks, losses, second)
    # What draws random numbers need not come to the same on all processes.
    if weights is not None:
        weights = weights_of_first(meeting, weights, columns.device)
    return [meeting.from_first(Stage.UPDATE, vector) for vector in vectors], weights


def _gradient(head: Tensor) -> Tensor | None:
    """The gradient of this process, as one row."""
    return None if head.grad is None else dense(head.grad).reshape(1, -1)


def check_group(group: object) -> Group:
    """
    Check the ``group`` argument of a step.

    :raises ParameterError: If it is no process group that this process is in.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise ParameterError(
            "group", "a torch.distributed process group with this process in it", repr(group)
        )
    return group
