from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from jdcore.distributed._replicas import replicas_of
from jdcore.distributed._sharding import Gathered, is_dtensor, is_flat, some_dtensor, some_flat
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


def refuse_sharded(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse tensors of which this process holds a part only, and what FSDP gathered from such.

    :raises ParameterError: Naming the kind of tensor.
    """
    given, gathered = list(tensors), Gathered()
    # Nearly always none is any of these, which takes fewer calls to tell of all of them.
    if not (gathered.modules or some_dtensor(given) or some_flat(given)):
        return
    for tensor in given:
        kind = _kind(tensor, gathered)
        if kind is not None:
            raise ParameterError(
                parameter,
                "tensors that this process holds in full",
                f"{kind}, {describe_tensor(tensor)}",
                "Rows of a Jacobian are not gathered across processes: their Gramian would be "
                "that of one shard, and the processes would drift apart.",
            )


def refuse_flat(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse parameters of FSDP1.

    :raises ParameterError: If one of the tensors is such a parameter.
    """
    if some_flat(tensors):
        raise ParameterError(
            parameter,
            "parameters of plain, DistributedDataParallel or fully_shard modules",
            "an FSDP FlatParameter (FullyShardedDataParallel)",
            "Its gradients cannot be told apart by parameter: use fully_shard instead.",
        )


def _kind(tensor: Tensor, gathered: Gathered) -> str | None:
    if is_dtensor(tensor):
        return "a DTensor (FSDP2 or tensor parallelism)"
    if is_flat(tensor):
        return "an FSDP FlatParameter"
    if tensor in gathered:
        return "a parameter gathered by FSDP2 (fully_shard)"
    return None


def refuse_replicated(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse parameters of a model that DistributedDataParallel keeps equal on several processes.

    :raises ParameterError: If one of the tensors is such a parameter.
    """
    if replicas_of(tensors):
        raise ParameterError(
            parameter,
            "parameters outside of DistributedDataParallel",
            "some of a DistributedDataParallel module",
            "Its gradient reduction takes no part, so each process would make a step of its own "
            "and the replicas would drift apart. Use backward and jac_to_grad, or Engine.backward.",
        )
