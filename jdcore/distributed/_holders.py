"""Processes that hold parameters together, each of which has samples of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from jdcore._fields import dense
from jdcore.distributed._gathering import can_be_gathered, divided_means, kept_gathered
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._replicas import replicas_of
from jdcore.distributed._replicated_step import check_group
from jdcore.distributed._sharding import Gathered, is_dtensor, like, some_dtensor
from jdcore.distributed._teams import group_of
from jdcore.distributed._transfers import buckets_of, mean_rows
from jdcore.errors import ParameterError


@frozen(eq=False)
class Holders:
    """
    Processes that hold parameters together: copies of them, or parts under FSDP2.

    :param group: The processes.
    :param groups: The same as a grid, one group for each dimension.
    :param tensors: The parameters, those under FSDP2 in the form that optimizers know.
    """

    group: Group
    groups: Sequence[Group]
    tensors: Sequence[Tensor]

    def meeting(self) -> Meeting:
        """A meeting of the processes."""
        # Numbers travel on the device of the parameters: the backend of a group may know no other
        # (NCCL).
        device = self.tensors[0].device if self.tensors else torch.device("cpu")
        return Meeting(self.groups, device)

    @contextmanager
    def gathered(self, meeting: Meeting) -> Iterator[None]:
        """
        Have all of every parameter on this process, for the time of a ``with`` block.

        :raises ParameterError: If they cannot be gathered.
        """
        if not some_dtensor(self.tensors):
            yield
            return
        gathered = Gathered()
        if not can_be_gathered(gathered, self.tensors):
            raise ParameterError(
                "modules",
                "divided among processes by fully_shard alone, where each loss is of one sample",
                "DTensors that cannot be gathered (tensor parallelism), or communication that is "
                "not that of FSDP2",
                "The shares of the samples are found from whole parameters. Use backward and "
                "jac_to_grad, which take a backward pass for each loss.",
            )
        meeting.agree(Stage.GATHER)
        with kept_gathered(gathered, self.tensors):
            yield

    def means(self, meeting: Meeting, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """
        The mean over processes of gradients, of which each process gets what it holds.

        :param gradients: Those of this process by the leaves of the graph.
        :returns: The means by the parameters as optimizers know them, in memory of their own.
        :raises ParameterError: If the processes have gradients of different tensors.
        """
        shard = Gathered().shard
        found = {shard(leaf): gradient for leaf, gradient in gradients.items()}
        # In the order of the parameters first: graphs of few samples may be walked in another one.
        own = {t: found[t] for t in dict.fromkeys([*self.tensors, *found]) if t in found}
        places = {t: i for i, t in enumerate(self.tensors)}
        words = [(places.get(t), tuple(t.shape), t.dtype) for t in own]
        if not meeting.agree_on(Stage.UPDATE, words):
            raise ParameterError(
                "output",
                "computed by the same parameters on all processes",
                f"losses of {len(own)} parameters here, others elsewhere",
            )
        # Copies are averaged as they are, parts by the processes that hold them.
        copies = {t: _row(g) for t, g in own.items() if not is_dtensor(t)}
        rows = mean_rows(meeting, buckets_of(copies, 1, self.group), list(copies.values()), 1)
        means = {t: row.view(t.shape) for t, row in zip(copies, rows, strict=True)}
        parts = divided_means(meeting, {t: g[None] for t, g in own.items() if is_dtensor(t)})
        return means | {t: like(t, part[0]) for t, part in parts.items()}


def find_holders(tensors: Sequence[Tensor], group: Any = None) -> Holders | None:
    """
    The processes that hold parameters together.

    :param tensors: The parameters, or what stands for them in a graph.
    :param group: The process group that keeps them equal, if the user says so.
    :returns: None if this process has them for itself.
    :raises ParameterError: If they belong to different groups.
    """
    if group is not None:
        check_group(group)
    shards = Gathered().shards(tensors)
    if some_dtensor(shards):
        return _of_shards(shards, group)
    chosen = group_of(replicas_of(tensors), group)
    if chosen is None or dist.get_world_size(chosen) == 1:
        return None
    return Holders(chosen, [chosen], shards)


def _of_shards(shards: Sequence[Tensor], group: Any) -> Holders:
    groups = Grid.of(shards).groups
    size = 1
    for each in groups:
        size *= dist.get_world_size(each)
    if group is not None:
        raise ParameterError(
            "group", "left out for DTensors, which know their mesh", "a process group"
        )
    # Samples are exchanged by one collective, for which all processes have to be in one group.
    if len(groups) == 1:
        return Holders(groups[0], groups, shards)
    whole: Any = dist.group.WORLD
    if size != dist.get_world_size(whole):
        raise ParameterError(
            "modules",
            "divided among the processes of one dimension of a mesh, or among all there are",
            f"a mesh of {len(groups)} dimensions with {size} processes",
            "Samples of some of the processes need a group of just these.",
        )
    return Holders(whole, groups, shards)


def _row(gradient: Tensor) -> Tensor:
    return dense(gradient).reshape(1, -1)
