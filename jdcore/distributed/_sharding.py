from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from jdcore._by_class import ByClass
from jdcore.distributed._meeting import Meeting, Stage


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP2 outside of the forward pass, tensor parallelism)."""
    return _is_dtensor_class[ref(type(tensor))]


def some_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether one of some tensors is a DTensor."""
    # There are fewer classes than parameters, each of which would cost a call.
    return any(map(_is_dtensor_class.__getitem__, map(ref, set(map(type, tensors)))))


@ByClass
def _is_dtensor_class(cls: type) -> bool:
    # By name, through all bases: importing the class would load torch.distributed.tensor.
    return any(base.__name__ == "DTensor" for base in cls.__mro__)


def is_flat(tensor: Tensor) -> bool:
    """Whether a tensor is a flat parameter of FSDP1, alone or behind the original parameters."""
    return some_flat([tensor])


def some_flat(tensors: Iterable[Tensor]) -> bool:
    """Whether one of some tensors is a flat parameter of FSDP1."""
    # FSDP1 marks its parameters so.
    return bool([t for t in tensors if getattr(t, "_is_flat_param", False)])


class Gathered:
    """
    The sharded parameters of modules under FSDP2, and the gathered ones that stand for them.

    In the forward pass, FSDP2 (``fully_shard``) replaces its sharded parameters by gathered ones,
    which are plain Parameters. They are the leaves of the graph, but no optimizer knows them, and
    they have no reference to their shards. Made anew in each call, as modules may come and go.
    """

    def __init__(self) -> None:
        self._shards: dict[int, Tensor] = {}
        self._gathered: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._states: list[Any] = []
        self.modules: list[Any] = []
        """What torch knows of the modules, in a fixed order."""
        for state in _module_states():
            groups = list(_groups_of(state))
            self._states += [state] if groups else []
            for group in groups:
                self.modules.append(group)
                for number, parameter in enumerate(group.fsdp_params):
                    self._places[id(parameter.sharded_param)] = len(self.modules), number
                    self._add(parameter)

    def _add(self, parameter: Any) -> None:
        # There is no public way from the one to the other. The attribute appears with the first
        # gathering and stays.
        gathered = getattr(parameter, "_unsharded_param", None)
        if gathered is not None:
            self._shards[id(gathered)] = parameter.sharded_param
            self._gathered[id(parameter.sharded_param)] = gathered

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._shards

    def shard(self, tensor: Tensor) -> Tensor:
        """The sharded parameter for a gathered one; any other tensor is its own."""
        return self._shards.get(id(tensor), tensor)

    def shards(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """:meth:`shard` of each."""
        return list(map(self.shard, tensors)) if self._shards else list(tensors)

    def place(self, tensor: Tensor) -> tuple[int, int] | None:
        """
        The numbers of the module of a sharded parameter, and of it there; None for any other one.

        Modules that are garbage count on some processes only, so that what agrees on all of them is
        which of two modules comes first.
        """
        return self._places.get(id(tensor))

    def leaf(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor in the graph: the gathered form of a sharded parameter."""
        return self._gathered.get(id(tensor), tensor)

    def leaves(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """:meth:`leaf` of each."""
        return list(map(self.leaf, tensors)) if self._gathered else list(tensors)

    def units(self, tensors: Iterable[Tensor]) -> list[Any]:
        """What torch knows of the modules whose parameters are among some sharded ones."""
        wanted = {id(tensor) for tensor in tensors}
        return [
            unit
            for unit in self.modules
            if any(id(parameter.sharded_param) in wanted for parameter in unit.fsdp_params)
        ]

    def units_of_pass(self, tensors: Iterable[Tensor]) -> list[Any]:
        """
        Those that a backward pass to some parameters gathers.

        Besides theirs, these are units of the same models without a trainable parameter.
        """
        reached = self.units(tensors)
        models = {id(unit.comm_ctx) for unit in reached}
        return reached + [
            unit
            for unit in self.modules
            if id(unit.comm_ctx) in models
            and not any(parameter.sharded_param.requires_grad for parameter in unit.fsdp_params)
        ]

    def is_plain(self, tensor: Tensor) -> bool:
        """Whether a sharded parameter is divided once, and gathered to a plain parameter."""
        whole, spread = self._gathered.get(id(tensor)), _as_any(tensor)
        return (
            whole is not None
            and not is_dtensor(whole)
            and (whole.shape, whole.device) == (tensor.shape, tensor.device)
            and sum(placement.is_shard() for placement in spread.placements) == 1
            and all(
                placement.is_shard() or placement.is_replicate() for placement in spread.placements
            )
        )

    def give_up_pass(self, tensors: Iterable[Tensor]) -> None:
        """
        Leave modules as they were before a pass that an error has stopped, without communication.

        :param tensors: Parameters that the pass was to reach.
        """
        models = {id(unit.comm_ctx) for unit in self.units(tensors)}
        units = [unit for unit in self.modules if id(unit.comm_ctx) in models]
        before = [(unit, unit.reduce_grads) for unit in units]
        for unit in units:
            unit.reduce_grads = False  # others may not have come as far
        self.end_pass()
        for unit, reduce in before:
            unit.reduce_grads = reduce
            # What was accumulated, of whole parameters, where the hooks of the pass put it.
            for parameter in unit.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                gathered = getattr(parameter, "_unsharded_param", None)
                if gathered is not None:
                    gathered.grad = None
            if unit.reshard_after_backward:
                unit.reshard()

    def end_pass(self) -> None:
        """
        Do what torch does at the end of a backward pass, where an error has kept it from it.

        Otherwise later passes take themselves for parts of this one.
        """
        for state in self._states:
            # The flag that keeps torch from queueing the callback twice in a pass.
            if state._state_ctx.post_backward_final_callback_queued:
                state._root_post_backward_final_callback()


def still_trainable(leaves: Iterable[Tensor]) -> list[Tensor]:
    """
    Those of some leaves that were not frozen after the forward pass.

    A gathered parameter learns that its shard was frozen when it is gathered again.
    """
    gathered = Gathered()
    return [leaf for leaf in leaves if gathered.shard(leaf).requires_grad]


def _as_any(tensor: Tensor) -> Any:
    return tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    anything: Any = tensor
    part: Tensor = anything.to_local() if is_dtensor(tensor) else tensor
    return part


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """
    A tensor spread over processes as another one is.

    :param part: What this process holds of it, of the shape of what it holds of the other one.
    """
    if not is_dtensor(tensor):
        return part
    from torch.distributed.tensor import DTensor  # loaded by whoever made the tensor

    spread: Any = tensor
    # A check would communicate; without the shape, all parts would be taken to be equally large.
    result: Tensor = DTensor.from_local(
        part,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=tensor.shape,
        stride=_contiguous(tensor.shape),
    )
    return result


def rows_like(tensor: Tensor, part: Tensor) -> Tensor:
    """
    A Jacobian ``[m, *S]`` spread over processes as its tensor of shape S is.

    :param part: What this process holds of it.
    """
    if not is_dtensor(tensor):
        return part
    from torch.distributed.tensor import DTensor  # loaded by whoever made the tensor

    spread: Any = tensor
    shape = torch.Size([len(part), *tensor.shape])
    result: Tensor = DTensor.from_local(
        part,
        spread.device_mesh,
        [_shifted(placement) for placement in spread.placements],
        run_check=False,
        shape=shape,
        stride=_contiguous(shape),
    )
    return result


def copied(meeting: Meeting, tensor: Tensor, matrix: Tensor) -> Tensor:
    """
    The rows [m, n] of a whole tensor.

    :param meeting: The processes.
    :param matrix: Those of what this process holds of it, [m, k].
    """
    part = matrix.view(len(matrix), *local_part(tensor).shape)
    rows: Any = rows_like(tensor, part)
    meeting.agree(Stage.ROWS)
    whole: Tensor = rows.full_tensor() if is_dtensor(tensor) else rows
    return whole.reshape(len(matrix), math.prod(tensor.shape))


def divided(tensor: Tensor, vector: Tensor) -> Tensor:
    """
    What this process is to hold of a vector [n] that is the same on all processes.

    :param tensor: Spread as the vector is to be.
    """
    if not is_dtensor(tensor):
        return vector
    from torch.distributed.tensor import DTensor, Replicate  # loaded with the tensor

    spread: Any = tensor
    everywhere = [Replicate()] * spread.device_mesh.ndim
    whole: Any = DTensor.from_local(
        vector.view(tensor.shape), spread.device_mesh, everywhere, run_check=False
    )
    part: Tensor = whole.redistribute(placements=spread.placements).to_local()
    return part.reshape(-1)


def _shifted(placement: Any) -> Any:
    """The placement with one more dimension in front."""
    if not hasattr(placement, "dim"):
        return placement
    if hasattr(placement, "split_factor"):  # what FSDP2 makes of tensor-parallel parameters
        return type(placement)(placement.dim + 1, split_factor=placement.split_factor)
    return type(placement)(placement.dim + 1)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


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
