"""Processes that hold parameters together, each of which has samples of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn

from jdcore._fields import dense
from jdcore.distributed._gathering import can_be_gathered, divided_means, kept_gathered
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._names import words_of
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
    :param promised: Whether the user says that all processes have them equal.
    """

    group: Group
    groups: Sequence[Group]
    tensors: Sequence[Tensor]
    promised: bool = False

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

    def agreed(self, meeting: Meeting, leaves: Iterable[Tensor], parameter: str) -> list[Tensor]:
        """
        Check that all processes have the same parameters, in the same order.

        :param leaves: Those of the graph.
        :param parameter: What the parameters are called in messages.
        :returns: The parameters, and after them those leaves that other processes hold as well.
        :raises ParameterError: If some are others, or no copies of those elsewhere.
        """
        shards = Gathered().shards(leaf for leaf in leaves if isinstance(leaf, nn.Parameter))
        found = dict.fromkeys(self.tensors)
        others = [shard for shard in shards if shard not in found]
        everything, count = [*self.tensors, *others], len(self.tensors)
        promised = self.tensors if self.promised else ()
        # By their places first: their numbers have to be read, all of them.
        for by_numbers in (False, True):
            words = words_of(everything, promised, by_numbers=by_numbers)
            same, equal = meeting.agree_on_each(Stage.COPIES, words[:count], words[count:])
            if same and equal:
                break
        if not same:
            raise ParameterError(
                parameter,
                "the same on all processes, in the same order",
                f"{count} tensors, of which some are not",
                "Wrap all of them in DistributedDataParallel, or name those that all processes "
                "hold.",
            )
        if not equal:
            raise ParameterError(
                "output",
                "computed by the same parameters on all processes",
                f"losses that depend on {len(others)} parameters besides `{parameter}`, others or "
                "other numbers elsewhere",
                "Wrap what they belong to in DistributedDataParallel, or make them equal.",
            )
        return everything

    def means(
        self, meeting: Meeting, known: Sequence[Tensor], gradients: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """
        The mean over processes of gradients, of which each process gets what it holds.

        :param known: As :meth:`agreed` returned them.
        :param gradients: Those of this process by tensor. Of others than the known ones there is no
            mean.
        :returns: The means by tensor, in memory of their own.
        :raises ParameterError: If the processes have gradients of different tensors.
        """
        # In the order that was agreed, not in that of the pass, which may differ.
        places = {t: i for i, t in enumerate(known) if t in gradients}
        if not meeting.agree_on(Stage.UPDATE, list(places.values())):
            raise ParameterError(
                "output",
                "computed by the same parameters on all processes",
                f"losses of {len(places)} parameters here, others elsewhere",
            )
        own = {t: gradients[t] for t in places}
        # Copies are averaged as they are, parts by the processes that hold them.
        copies = {t: _row(g) for t, g in own.items() if not is_dtensor(t)}
        rows = mean_rows(meeting, buckets_of(copies, 1, self.group), list(copies.values()), 1)
        means = {t: row.view(t.shape) for t, row in zip(copies, rows, strict=True)}
        parts = divided_means(meeting, {t: g[None] for t, g in own.items() if is_dtensor(t)})
        return means | {t: like(t, part[0]) for t, part in parts.items()}


def find_holders(
    tensors: Sequence[Tensor], group: Any = None, *, named: bool = True
) -> Holders | None:
    """
    The processes that hold parameters together.

    :param tensors: The parameters, or what stands for them in a graph.
    :param group: The process group that keeps them equal, if the user says so.
    :param named: Whether the user named them, or they are what was found in a graph.
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
    return Holders(chosen, [chosen], shards, promised=named and group is not None)


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
