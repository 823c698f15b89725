from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from jdcore.distributed._meeting import Group
from jdcore.distributed._sharding import is_dtensor
from jdcore.errors import ParameterError

_Ranks: TypeAlias = "tuple[int, ...]"


@frozen(eq=False)
class Grid:
    """
    The processes over which DTensors are spread, as a grid.

    :param groups: The group of this process along each dimension.
    """

    groups: Sequence[Group]

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Grid:
        """
        The smallest grid of which the meshes of some tensors are parts.

        :raises ParameterError: If the meshes do not fit together.
        """
        groups: dict[_Ranks, Group] = {}
        for tensor in tensors:
            for group in _groups_of(tensor):
                groups.setdefault(_ranks(group), group)
        _check_orthogonal(list(groups.values()))
        return Grid(list(groups.values()))

    def counts(self, tensor: Tensor) -> bool:
        """
        Whether what this process holds of a tensor counts: of equal copies, the first.

        A tensor is copied along those dimensions that it is not divided along.
        """
        divided = {_ranks(group) for group in _dividing(tensor)}
        return all(dist.get_rank(g) == 0 for g in self.groups if _ranks(g) not in divided)

    def copies(self, tensor: Tensor) -> list[Group]:
        """The groups of processes that hold the same part of a tensor."""
        divided = {_ranks(group) for group in _dividing(tensor)}
        return [group for group in self.groups if _ranks(group) not in divided]

    def unknown(self, tensor: Tensor) -> list[Group]:
        """The groups of which a tensor knows nothing: no DTensor keeps its copies there equal."""
        known = {_ranks(group) for group in _groups_of(tensor)}
        return [group for group in self.groups if _ranks(group) not in known]


def _ranks(group: Group) -> _Ranks:
    # Not the group itself: torch takes one mesh for another that is equal, with groups of its own.
    return tuple(dist.get_process_group_ranks(group))


def _groups_of(tensor: Tensor) -> list[Group]:
    if not is_dtensor(tensor):
        return []
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


def _dividing(tensor: Tensor) -> list[Group]:
    # Not is_shard(): it says False of what FSDP2 makes of tensor-parallel parameters.
    placements: Any = getattr(tensor, "placements", ())
    pairs = zip(_groups_of(tensor), placements, strict=True)
    return [group for group, placement in pairs if not placement.is_replicate()]


def _check_orthogonal(groups: list[Group]) -> None:
    # Sums over one dimension after the other are sums over all processes only if the dimensions
    # cross.
    me = dist.get_rank() if groups else 0
    seen: set[int] = set()
    for group in groups:
        # Two dimensions of one grid have this process in common, and no other.
        others = set(dist.get_process_group_ranks(group)) - {me}
        if others & seen:
            raise ParameterError(
                "tensors",
                "on meshes that are dimensions of one grid of processes",
                "DTensors on meshes that overlap",
                "Aggregate the parameters of different meshes in separate calls.",
            )
        seen |= others
