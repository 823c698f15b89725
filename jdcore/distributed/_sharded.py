from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from jdcore.aggregation._columns import Columns
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._replicated import weights_of_first
from jdcore.errors import ParameterError
from jdcore.linalg._gramian import sum_cross_gramians, sum_gramians, symmetric

# What the Gramians of plain parameters may differ by on processes that compute the same.
_TOLERANCE = 1e-3


class ShardedColumns(Columns):
    """
    A Jacobian with respect to parameters that are divided among processes.

    Each process has the columns of its part, and copies of some. Products of columns that it is the
    first to hold add up to those of all; a weighted sum needs no other process.

    :param meeting: The processes.
    :param grid: How they hold the tensors.
    :param tensors: The parameters, the same on all processes.
    :param matrices: The rows [m, k] of what this process holds of each.
    :param second: The same of a second batch, if there is one.
    """

    def __init__(
        self,
        meeting: Meeting,
        grid: Grid,
        tensors: Sequence[Tensor],
        matrices: Sequence[Tensor],
        second: Sequence[Tensor] | None,
    ) -> None:
        super().__init__(list(matrices), None if second is None else list(second))
        self._meeting = meeting
        self._grid = grid
        self._tensors = tensors
        # A copied column would be counted once for each process that holds it.
        self._counts = [grid.counts(tensor) for tensor in tensors]
        check_copies(meeting, grid, tensors, self.blocks, "tensors")

    def product(self, scale: float) -> Tensor:
        own = sum_gramians(self._counted(self.blocks, scale))
        # Sums of three processes need not be taken in the same order in both triangles.
        return symmetric(self._meeting.total(Stage.GRAMIAN, own))

    def cross_product(self, scale: float) -> Tensor:
        one, two = (self._counted(part, scale) for part in (self.blocks, self.second or []))
        return self._meeting.total(Stage.GRAMIAN, sum_cross_gramians(one, two))

    def largest(self) -> float:
        own = torch.tensor(super().largest(), dtype=torch.float64, device=self.device)
        return float(self._meeting.maximum(Stage.LARGEST, own))

    def agreed(self, weights: Tensor) -> Tensor:
        return weights_of_first(self._meeting, weights, self.device)

    def rounded_to(self) -> torch.dtype:
        return self.precision  # what the parts tell need not be the same on all processes

    def apply(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        # What is sent has to lie in one piece.
        vectors = [function(block).contiguous() for block in self.blocks]
        self._meeting.agree(Stage.UPDATE)
        # A method of a third party may draw random numbers without saying so.
        for tensor, vector in zip(self._tensors, vectors, strict=True):
            for group in self._grid.copies(tensor):
                dist.broadcast(vector, src=dist.get_global_rank(group, 0), group=group)
        return vectors

    def inner(self, vectors: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        counted = [
            vector[: vector.numel() * c] for vector, c in zip(vectors, self._counts, strict=True)
        ]
        products, square = Columns(self._counted(self.blocks, 1.0)).inner(counted, scale)
        both = self._meeting.total(Stage.INNER, torch.cat([products, square[None]]))
        return both[:-1], both[-1]

    def finite(self) -> bool:
        [bad] = self._meeting.agree(Stage.FINITE, int(not super().finite()))
        return not bad

    def nonfinite_rows(self) -> list[int]:
        flags = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        flags[super().nonfinite_rows()] = 1
        return self._meeting.maximum(Stage.FINITE, flags).nonzero().flatten().tolist()

    def _counted(self, blocks: Sequence[Tensor], scale: float) -> list[Tensor]:
        """Blocks divided by ``scale``, without the columns that another process counts."""
        pairs = zip(blocks, self._counts, strict=True)
        counted = [block if counts else block[:, :0] for block, counts in pairs]
        return counted if scale == 1.0 else [block / scale for block in counted]


def check_copies(
    meeting: Meeting,
    grid: Grid,
    tensors: Sequence[Tensor],
    matrices: Sequence[Tensor],
    parameter: str,
) -> None:
    """
    Check that copies which no DTensor keeps equal have the same rows.

    :param grid: How the processes hold the tensors.
    :param tensors: The parameters, the same on all processes.
    :param matrices: The rows [m, k] of what this process holds of each.
    :param parameter: What the parameters are called in messages.
    :raises ParameterError: If they differ: nobody has reduced them.
    """
    unsure: dict[tuple[Group, ...], list[Tensor]] = {}
    for tensor, matrix in zip(tensors, matrices, strict=True):
        groups = grid.unknown(tensor)
        if groups:
            unsure.setdefault(tuple(groups), []).append(matrix)
    if not unsure:  # on all processes, as all have the same tensors
        return
    differ = [_differ(meeting, some, groups) for groups, some in unsure.items()]
    [anywhere] = meeting.agree(Stage.PRESENCE, int(any(differ)))
    if anywhere:
        raise ParameterError(
            parameter,
            "DTensors, or parameters with the same rows on all processes of their mesh",
            "plain parameters whose rows differ between processes",
            "Their gradients are not reduced by anything: shard them too, or make them "
            "DTensors with the placement Replicate().",
        )


def _differ(meeting: Meeting, blocks: list[Tensor], groups: Sequence[Group]) -> bool:
    """Whether rows differ between the processes of some groups."""
    # Of rows that are equal up to rounding, the products are, too: m x m numbers for each parameter
    # in place of its rows.
    own = torch.stack([sum_gramians([block]) for block in blocks])
    both = torch.stack([own, -own])
    meeting.agree(Stage.PRESENCE)
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return float((both[0] + both[1]).max()) > _TOLERANCE * float(both.abs().max())
