from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP2 outside of the forward pass, tensor parallelism)."""
    # By name, through all bases: importing the class would load torch.distributed.tensor.
    return any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def is_flat(tensor: Tensor) -> bool:
    """Whether a tensor is a flat parameter of FSDP1, alone or behind the original parameters."""
    return getattr(tensor, "_is_flat_param", False)


def gathered_parameters() -> dict[int, Tensor]:
    """
    The sharded parameter, by the ``id`` of its gathered form, for all modules under FSDP2.

    In the forward pass, FSDP2 (``fully_shard``) replaces its sharded parameters by gathered ones,
    which are plain Parameters. They are the leaves of the graph, but no optimizer knows them, and
    they have no reference to their shards.
    """
    found: dict[int, Tensor] = {}
    for parameter in _fsdp_parameters():
        # There is no public way from the one to the other. The attribute appears with the first
        # gathering and stays.
        gathered = getattr(parameter, "_unsharded_param", None)
        if gathered is not None:
            found[id(gathered)] = parameter.sharded_param
    return found


def _fsdp_parameters() -> Iterator[Any]:
    for state in _module_states():
        for group in _groups_of(state):
            yield from group.fsdp_params


def _module_states() -> Iterator[Any]:
    # Where torch files the state of composable APIs. Not imported, there is none.
    module = sys.modules.get("torch.distributed._composable_state")
    for reference in list(getattr(module, "_module_state_mapping", {}).values()):
        state = reference() if callable(reference) else reference  # a weak reference since 2.6
        if state is not None:
            yield state


def _groups_of(state: Any) -> Iterable[Any]:
    # One group per module until torch 2.11; several where parameters have meshes of their own.
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        groups: Iterable[Any] = several
        return groups
    single = getattr(state, "_fsdp_param_group", None)
    return () if single is None else (single,)
