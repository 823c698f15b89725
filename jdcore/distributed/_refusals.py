from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from jdcore.distributed._sharding import gathered_parameters, is_dtensor, is_flat
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor

# Parameters that were seen to belong to no DistributedDataParallel module.
_LOCAL = WeakIdKeyDictionary()


def refuse_sharded(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse tensors of which this process holds a part only, and what FSDP gathered from such.

    :raises ParameterError: Naming the kind of tensor.
    """
    gathered = gathered_parameters()
    for tensor in tensors:
        kind = _kind(tensor, gathered)
        if kind is not None:
            raise ParameterError(
                parameter,
                "tensors that this process holds in full",
                f"{kind}, {describe_tensor(tensor)}",
                "Rows of a Jacobian are not gathered across processes: their Gramian would be "
                "that of one shard, and the processes would drift apart.",
            )


def _kind(tensor: Tensor, gathered: dict[int, Tensor]) -> str | None:
    if is_dtensor(tensor):
        return "a DTensor (FSDP2 or tensor parallelism)"
    if is_flat(tensor):
        return "an FSDP FlatParameter"
    if id(tensor) in gathered:
        return "a parameter gathered by FSDP2 (fully_shard)"
    return None


def refuse_replicated(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse parameters of a model that DistributedDataParallel keeps equal on several processes.

    :raises ParameterError: If one of the tensors is such a parameter.
    """
    if not _several_processes():
        return
    unknown = [tensor for tensor in tensors if tensor not in _LOCAL]
    if not unknown:
        return
    replicated = {id(parameter) for module in _replicas() for parameter in module.parameters()}
    for tensor in unknown:
        if id(tensor) in replicated:
            raise ParameterError(
                parameter,
                "parameters outside of DistributedDataParallel",
                f"{describe_tensor(tensor)} of a DistributedDataParallel module",
                "Its gradient reduction does not take part in computing Jacobians, so each process "
                "would make a step of its own and the replicas would drift apart. Use the module "
                "without the wrapper and average the .grad fields (or the .jac fields, before "
                "jac_to_grad) with torch.distributed.all_reduce.",
            )
    for tensor in unknown:
        _LOCAL[tensor] = None


def _several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _replicas() -> Iterator[DistributedDataParallel]:
    # A parameter does not know the reducer that watches it, nor is there a list of the wrappers.
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            yield thing
