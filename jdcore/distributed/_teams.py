from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jdcore.distributed._meeting import Group
from jdcore.distributed._replicas import parameters_of, replicas_of
from jdcore.distributed._replicated_step import Replicas, check_group
from jdcore.distributed._sharded_step import Shards
from jdcore.distributed._sharding import some_dtensor
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor

Team: TypeAlias = "Replicas | Shards"


def find_team(tensors: Sequence[Tensor], group: Any = None, *, named: bool = True) -> Team | None:
    """
    How tensors are spread over processes.

    :param tensors: Tensors that are to be aggregated.
    :param group: The process group that keeps them equal, if the user says so.
    :param named: Whether the user named them, or they are what was found in a graph.
    :returns: None if this process has them for itself.
    :raises ParameterError: If they belong to different groups.
    """
    if group is not None:
        check_group(group)
    replicas = replicas_of(tensors)
    if some_dtensor(tensors):
        if group is not None or replicas:
            raise ParameterError(
                "group" if group is not None else "tensors",
                "left out for DTensors, which know their mesh",
                "a process group" if group is not None else "some in DistributedDataParallel",
                "Shard or replicate them all by fully_shard with a mesh of two dimensions.",
            )
        return Shards.of(tensors)
    chosen = group_of(replicas, group)
    # Of one process, everything is here: the ordinary step is faster, and has the same result.
    if chosen is None or dist.get_world_size(chosen) == 1:
        return None
    # With `group`, the user says that all of them are equal, wrapped or not.
    if group is None:
        _check_all_known(tensors, {id(p) for r in replicas for p in parameters_of(r)})
    return Replicas.of(tensors, chosen, named)


def group_of(replicas: Sequence[DistributedDataParallel], group: Any) -> Group | None:
    """
    The group of some wrappers, or the one given.

    :raises ParameterError: If they are different ones.
    """
    # By identity: two groups of the same processes exchange in orders of their own.
    groups = list(dict.fromkeys(replica.process_group for replica in replicas))
    if len(groups) > 1 or (groups and group is not None and groups[0] is not group):
        raise ParameterError(
            "group" if group is not None else "tensors",
            "the process group of the DistributedDataParallel modules of the tensors",
            f"{len({*groups, *([] if group is None else [group])})} different groups",
            "Aggregate the parameters of different groups in separate calls.",
        )
    chosen: Group | None = groups[0] if groups else group
    return chosen


def _check_all_known(tensors: Sequence[Tensor], known: set[int]) -> None:
    for tensor in tensors:
        if id(tensor) not in known and tensor.requires_grad:
            raise ParameterError(
                "tensors",
                "all parameters of DistributedDataParallel modules, or come with `group`",
                f"{describe_tensor(tensor)} outside of them among some inside",
                "Wrap what it belongs to as well, or pass group= if all processes have it.",
            )
