"""
Rows of parameters under FSDP2 that are gathered for some passes, and divided when these are over.

The hooks of FSDP2 gather parameters in a backward pass and reduce what it accumulates. A pass that
accumulates nothing, on parameters that are there already, leaves them nothing to do: no process
waits for another during it, several rows can be differentiated at once, and an error is told to the
others like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor
from torch.autograd.graph import Node

from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._sharding import Gathered, is_dtensor, local_part
from jdcore.distributed._transfers import scattered
from jdcore.graph import Reach
from jdcore.graph._hooks import ignore_hooks, is_ignored
from jdcore.graph._operations import note_handing_on

# As much as DistributedDataParallel sends at once.
_BYTES = 25 << 20

_FUNCTIONS = frozenset(
    {"RegisterPostBackwardFunctionBackward", "RegisterPreBackwardFunctionBackward"}
)

# By this hook of the outputs of its modules, FSDP2 gathers their parameters.
# By the functions above, on their inputs, it divides them again.
ignore_hooks("FSDPState._pre_backward")
note_handing_on(_FUNCTIONS)


def without_hooks(graph: Reach) -> Reach:
    """
    The same graph without the functions by which FSDP2 hears of a backward pass.

    They hand gradients on as they are, and accumulate nothing where nothing is to be reduced.
    """
    if not graph.functions:
        return graph
    return evolve(graph, functions=tuple(f for f in graph.functions if not _hands_on(f)))


def _hands_on(node: Node) -> bool:
    return node.name() in _FUNCTIONS


def has_hooks(tensor: Tensor) -> bool:
    """Whether a tensor has hooks, besides that by which FSDP2 hears of a backward pass."""
    hooks: Mapping[int, Callable[..., object]] | None = tensor._backward_hooks
    return not all(map(is_ignored, (hooks or {}).values()))


@contextmanager
def kept_gathered(gathered: Gathered, tensors: Sequence[Tensor]) -> Iterator[None]:
    """
    Gather parameters, and let backward passes neither divide nor reduce them, for a ``with`` block.

    All processes must do so with the same parameters.

    :param tensors: The parameters, in the form that optimizers know.
    """
    units = gathered.units_of_pass(tensors)
    # Fields that `set_reshard_after_backward` and `set_requires_gradient_sync` of a module set,
    # which it does not let one read.
    before = [(unit, unit.reshard_after_backward, unit.reduce_grads) for unit in units]
    for unit in units:
        unit.unshard(async_op=False)
        unit.wait_for_unshard()
        unit.reshard_after_backward = unit.reduce_grads = False
    try:
        yield
    finally:
        gathered.end_pass()
        for unit, reshard, reduce in before:
            unit.reshard_after_backward, unit.reduce_grads = reshard, reduce
            if reshard:
                unit.reshard()


def can_be_gathered(gathered: Gathered, tensors: Sequence[Tensor]) -> bool:
    """
    Whether parameters can be gathered and their rows be divided here.

    :param tensors: The parameters, sharded ones in the form that optimizers know.
    """
    # Not DTensors in the graph: torch 2.13 cannot batch them ("Cannot access data pointer"), and
    # the backward of operations on them communicates, which no meeting can stand in for.
    # What a user changed of the way in which FSDP2 reduces is not repeated by our exchange.
    ordinary = all(_is_ordinary(unit) for unit in gathered.units(tensors))
    return ordinary and all(map(gathered.is_plain, filter(is_dtensor, tensors)))


def _is_ordinary(unit: Any) -> bool:
    """Whether gradients are reduced as FSDP2 does it without being told otherwise."""
    # By its name, as torch promises no place to import these classes from.
    collective = type(getattr(unit, "_reduce_scatter_comm", None)).__name__
    return (
        unit.gradient_divide_factor is None
        and unit._all_reduce_hook is None
        and collective in ("DefaultReduceScatter", "ProcessGroupAllocReduceScatter", "NoneType")
    )


@frozen(eq=False)
class Spread:
    """
    How a parameter under FSDP2 is divided.

    :param tensor: The parameter, in the form that optimizers know.
    :param group: The processes among which it is divided.
    :param copies: Groups of processes that hold the same part.
    :param dimension: Along which dimension it is divided.
    """

    tensor: Tensor
    group: Group
    copies: tuple[Group, ...]
    dimension: int

    @staticmethod
    def of(tensor: Any) -> Spread:
        """What the placements of a parameter say."""
        mesh = tensor.device_mesh
        pairs = [(mesh.get_group(i), placement) for i, placement in enumerate(tensor.placements)]
        # Of a mesh of two dimensions, one divides and the other one holds copies (HSDP).
        [(group, shard)] = [pair for pair in pairs if pair[1].is_shard()]
        return Spread(tensor, group, tuple(g for g, p in pairs if p is not shard), shard.dim)

    @property
    def size(self) -> int:
        """Number of processes among which it is divided."""
        return dist.get_world_size(self.group)

    def pieces(self, rows: Tensor) -> list[Tensor]:
        """The rows [m, k] of what each process holds, given those of the parameter [m, *S]."""
        # As torch divides a dimension: the last processes may have less than the others, or
        # nothing.
        parts = list(torch.chunk(rows, self.size, dim=self.dimension + 1))
        flat = [part.reshape(len(rows), -1) for part in parts]
        return flat + [flat[0][:, :0]] * (self.size - len(flat))

    def fits(self, other: Spread) -> bool:
        """Whether both can be sent together."""
        kinds = [(s.group, s.copies, s.tensor.dtype, s.tensor.device) for s in (self, other)]
        return kinds[0] == kinds[1]


def divided_means(meeting: Meeting, rows: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """
    The mean over processes of rows, of which each process gets those of what it holds.

    :param rows: The rows [m, *S] of this process by parameter, in the form that optimizers know;
        the same parameters in the same order on all processes.
    :returns: The rows [m, *local S] by parameter.
    """
    spreads = [Spread.of(tensor) for tensor in rows]
    found: dict[Tensor, Tensor] = {}
    buckets = list(_buckets(spreads, rows))
    packed = ((_packed(bucket, rows), bucket[0].group) for bucket in buckets)
    for bucket, mine in zip(buckets, scattered(meeting, packed), strict=True):
        for group in bucket[0].copies:
            # The parts first, then the mean over copies of the same part: that sends a fraction of
            # what means of whole rows would.
            meeting.agree(Stage.ROWS)
            dist.all_reduce(mine, group=group)
            mine.div_(dist.get_world_size(group))
        found.update(_unpacked(bucket, mine))
    return found


def _buckets(spreads: Sequence[Spread], rows: Mapping[Tensor, Tensor]) -> Iterator[list[Spread]]:
    chosen: list[Spread] = []
    filled = 0
    for spread in spreads:
        size = rows[spread.tensor].numel() * spread.tensor.itemsize
        # One exchange has one group, one dtype and one device.
        if chosen and (filled + size > _BYTES or not spread.fits(chosen[0])):
            yield chosen
            chosen, filled = [], 0
        chosen.append(spread)
        filled += size
    if chosen:
        yield chosen


def _packed(bucket: Sequence[Spread], rows: Mapping[Tensor, Tensor]) -> Tensor:
    """What each process is to get, [R, m, width]; the narrower ones are filled up with zeros."""
    tensor = bucket[0].tensor
    pieces = [spread.pieces(rows[spread.tensor]) for spread in bucket]
    widths = [
        sum(piece.shape[1] for piece in of_process) for of_process in zip(*pieces, strict=True)
    ]
    m = len(rows[tensor])
    packed = torch.zeros(
        bucket[0].size, m, max(1, *widths), dtype=tensor.dtype, device=tensor.device
    )
    for place, of_process in zip(packed, zip(*pieces, strict=True), strict=True):
        width = sum(piece.shape[1] for piece in of_process)
        columns = torch.split(place[:, :width], [piece.shape[1] for piece in of_process], dim=1)
        for column, piece in zip(columns, of_process, strict=True):
            column.copy_(piece)
    return packed


def _unpacked(bucket: Sequence[Spread], mine: Tensor) -> dict[Tensor, Tensor]:
    found, start = {}, 0
    for spread in bucket:
        part = local_part(spread.tensor)
        columns = mine[:, start : start + part.numel()]
        found[spread.tensor] = torch.empty(
            (len(mine), *part.shape), dtype=part.dtype, device=part.device
        ).copy_(columns.view(len(mine), *part.shape))
        start += part.numel()
    return found
