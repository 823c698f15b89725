"""The losses, as tasks and samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from jdcore.graph._graph import Walk
from jdcore.linalg._combine import sent


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Objectives:
    """
    The losses, seen as K tasks by B samples.

    :param outputs: The losses as given: one tensor where there are samples.
    :param batch_dim: Their dimension of samples, None if there is none: then B = 1.
    """

    outputs: Sequence[Tensor]
    batch_dim: int | None

    @cached_property
    def walk(self) -> Walk:
        """All that lies behind the losses."""
        return Walk(self.outputs)

    @cached_property
    def rows(self) -> int:
        """The number of losses."""
        return sum([output.numel() for output in self.outputs])

    @cached_property
    def samples(self) -> int:
        """B."""
        return 1 if self.batch_dim is None else self.outputs[0].shape[self.batch_dim]

    @cached_property
    def tasks(self) -> int:
        """K."""
        return self.rows // max(1, self.samples)

    def by_task(self, weights: Tensor) -> Tensor:
        """Bring a tensor of one entry per loss, in their order, into the shape [K, B]."""
        if self.batch_dim is None:
            return weights.reshape(-1, 1)
        moved = weights.reshape(self.outputs[0].shape).movedim(self.batch_dim, -1)
        return moved.reshape(self.tasks, self.samples)

    def ordered(self, total: Tensor) -> Tensor:
        """Bring rows and columns from the order [K, B] into that of the flattened losses."""
        if self.batch_dim is None or self.tasks == 1:
            return total
        output = self.outputs[0]
        last, moved = output.ndim - 1, output.movedim(self.batch_dim, -1).shape
        # The samples go back to their place in the first half of the dimensions and in the second.
        axes = self.batch_dim, last + 1 + self.batch_dim
        return total.view(*moved, *moved).movedim((last, 2 * last + 1), axes).reshape(total.shape)

    def seeds_of_tasks(self, tasks: Sequence[int]) -> Tensor:
        """
        The gradients that tasks start with, for all their samples.

        :param tasks: One task, or the first ones.
        :returns: Shape ``[len(tasks), *output.shape]``.
        """
        assert self.batch_dim is not None
        if self.tasks == 1:
            return torch.ones_like(self.outputs[0])[None]
        moved = self.outputs[0].movedim(self.batch_dim, -1)
        seeds = torch.zeros(len(tasks), *moved.shape, dtype=moved.dtype, device=moved.device)
        by_task = seeds.view(len(tasks), self.tasks, self.samples)
        # The first tasks are a unit matrix over the tasks, the last one alone is one row of it.
        if tasks[0] == 0:
            by_task.diagonal(dim1=0, dim2=1).fill_(1)
        else:
            by_task[0, tasks[0]].fill_(1)  # an assignment takes three times as long
        return seeds.movedim(-1, self.batch_dim + 1)

    def seeds(self, weights: Tensor) -> list[Tensor]:
        """The gradients to start with for weighted losses."""
        parts = torch.split(weights.reshape(-1), [output.numel() for output in self.outputs])
        return [
            sent(part.view(output.shape), output.device, output.dtype)
            for part, output in zip(parts, self.outputs, strict=True)
            if output.requires_grad
        ]

    def differentiable(self) -> list[Tensor]:
        """The outputs that have a graph."""
        return [output for output in self.outputs if output.requires_grad]


class OneByOne(Objectives):
    """The same losses as K B tasks without samples, in the order [K, B]."""

    @cached_property
    def samples(self) -> int:
        return 1
