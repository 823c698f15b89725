from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jdcore.aggregation._columns import Columns, narrowest
from jdcore.distributed._meeting import Meeting, Stage
from jdcore.distributed._transfers import Bucket, gathered, mean_rows, mean_shards
from jdcore.linalg import combine
from jdcore.linalg._gramian import symmetric


class ReplicatedColumns(Columns):
    """
    The mean over processes of their Jacobians with respect to the same parameters.

    The Gramian of a mean has products of the rows of all pairs of processes. So it is the columns
    that are divided: each process gets the mean rows of some of them, which costs half of what it
    costs to give all to all, and the products of its columns add up to those of all. A method that
    does not ask for the Gramian costs one mean of one vector.

    :param meeting: The processes.
    :param buckets: The parameters, the same on all processes.
    :param matrices: The rows [m, n] of this process for each parameter; None stands for zeros.
    :param second: The same of a second batch, if there is one.
    :param rows: Number of rows m.
    """

    def __init__(
        self,
        meeting: Meeting,
        buckets: Sequence[Bucket],
        matrices: Sequence[Tensor | None],
        second: Sequence[Tensor | None] | None,
        rows: int,
    ) -> None:
        # No columns yet: which of them this process gets is decided, and paid for, when somebody
        # looks at rows.
        super().__init__([], None if second is None else [])
        self._meeting = meeting
        self._buckets = buckets
        self._matrices = matrices
        self._second = second
        self.rows = rows
        self._vectors: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return self._buckets[0].tensors[0].device

    @property
    def precision(self) -> torch.dtype:
        return narrowest([t.dtype for bucket in self._buckets for t in bucket.tensors])

    def rounded_to(self) -> torch.dtype:
        return self.precision  # a mean is rounded anew

    def gramian(self) -> Tensor:
        self._divide()
        return super().gramian()

    def cross_gramian(self) -> Tensor:
        self._divide()
        return super().cross_gramian()

    def cross_product(self, scale: float) -> Tensor:
        return self._meeting.total(Stage.GRAMIAN, super().cross_product(scale))

    def product(self, scale: float) -> Tensor:
        # Sums of three processes need not be taken in the same order in both triangles.
        return symmetric(self._meeting.total(Stage.GRAMIAN, super().product(scale)))

    def largest(self) -> float:
        own = torch.tensor(super().largest(), dtype=torch.float64, device=self.device)
        return float(self._meeting.maximum(Stage.LARGEST, own))

    def agreed(self, weights: Tensor) -> Tensor:
        return weights_of_first(self._meeting, weights, self.device)

    def combine(self, weights: Tensor, *, wide: bool = False) -> list[Tensor]:
        if self.blocks:
            return gathered(self._meeting, self._buckets, super().combine(weights, wide=wide))
        # Nobody asked for the Gramian: a weighted sum is linear, so that the mean may be taken
        # after it, of one row instead of m.
        tensors = [tensor for bucket in self._buckets for tensor in bucket.tensors]
        pairs = zip(tensors, self._matrices, strict=True)
        own = [t.new_zeros(t.numel()) if m is None else combine(weights, m) for t, m in pairs]
        rows = [vector[None] for vector in own]
        return [vector[0] for vector in mean_rows(self._meeting, self._buckets, rows, 1)]

    def apply(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        self._divide()
        # Kept for `inner`: the columns of this process, of which the whole vectors are no part.
        self._vectors = [function(block) for block in self.blocks]
        return gathered(self._meeting, self._buckets, self._vectors)

    def inner(self, vectors: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        products, square = super().inner(self._vectors, scale)
        both = self._meeting.total(Stage.INNER, torch.cat([products, square[None]]))
        return both[:-1], both[-1]

    def finite(self) -> bool:
        self._divide()
        [bad] = self._meeting.agree(Stage.FINITE, int(not super().finite()))
        return not bad

    def nonfinite_rows(self) -> list[int]:
        self._divide()
        flags = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        flags[super().nonfinite_rows()] = 1
        return self._meeting.maximum(Stage.FINITE, flags).nonzero().flatten().tolist()

    def whole(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The mean rows of all columns, one matrix for each parameter; and of the second batch."""
        rows = mean_rows(self._meeting, self._buckets, self._matrices, self.rows)
        if self._second is None:
            return rows, None
        return rows, mean_rows(self._meeting, self._buckets, self._second, self.rows)

    def _divide(self) -> None:
        if not self.blocks:
            self.blocks = mean_shards(self._meeting, self._buckets, self._matrices, self.rows)
            if self._second is not None:
                self.second = mean_shards(self._meeting, self._buckets, self._second, self.rows)


def weights_of_first(meeting: Meeting, weights: Tensor, device: torch.device) -> Tensor:
    """
    The weights that the first process found.

    Those of the others are the same, unless the method draws random numbers or the processors round
    differently.
    """
    wide = weights.to(device, torch.float64, copy=True)
    return meeting.from_first(Stage.WEIGHTS, wide).to(weights)
