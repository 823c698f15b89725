"""
Rows of parameters that are divided among processes, by one accumulating backward pass for each.

The hooks of FSDP2 reduce what a pass accumulates, and know no other way; those of DTensor compute
on gradients one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from jdcore._fields import set_aside
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Meeting, Stage
from jdcore.distributed._sharding import Gathered, is_dtensor, local_part
from jdcore.errors import ParameterError
from jdcore.graph import reach


@frozen(eq=False)
class Pass:
    """
    A backward pass.

    :param outputs: Tensors that it starts from. None for a row of zeros, which needs no pass.
    :param cotangents: Their gradients.
    """

    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]


def is_spread(tensors: Sequence[Tensor]) -> bool:
    """Whether some tensors, or what stands for them in a graph, are divided among processes."""
    gathered = Gathered()
    return any(is_dtensor(gathered.shard(tensor)) for tensor in tensors)


@torch.no_grad()
def run_passes(
    passes: Sequence[Pass],
    targets: Sequence[Tensor],
    retain_graph: bool,
    collect: Callable[[int, int, Tensor], object],
) -> None:
    """
    Run backward passes and collect what each would accumulate; every ``.grad`` is left as it was.

    :param passes: The passes. All processes must run the same, through the same modules.
    :param targets: The parameters that are wanted, sharded ones in the form that optimizers know.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param collect: Takes the number of the pass, the number of the target, and its gradient: what
        this process holds of it, in the placement of the target.
    :raises ParameterError: If the processes are to run different passes.
    :raises PeerError: If another process cannot take part.
    """
    gathered = Gathered()
    outputs = dict.fromkeys(output for each in passes for output in each.outputs)
    leaves = gathered.shards(reach(outputs).leaves)
    everything = list(dict.fromkeys([*targets, *leaves]))
    units = gathered.units(everything)
    grid = Grid.of(everything)
    with Meeting(grid.groups, local_part(everything[0]).device) as meeting:
        _check_units(units)
        _meet(meeting, passes, gathered, everything)
    last_number = max((n for n, each in enumerate(passes) if each.outputs), default=-1)
    with set_aside(everything), _kept_gathered(units) as free:
        for number, each in enumerate(passes):
            if not each.outputs:
                continue
            last = number == last_number
            if last and not retain_graph:
                free()
            with torch.enable_grad():
                torch.autograd.backward(
                    each.outputs, each.cotangents, retain_graph=retain_graph or not last
                )
            for place, target in enumerate(targets):
                if target.grad is not None:
                    collect(number, place, _reduced(target))
            for tensor in everything:
                tensor.grad = None


def _meet(
    meeting: Meeting, passes: Sequence[Pass], gathered: Gathered, everything: Sequence[Tensor]
) -> None:
    """Check that all processes are to run passes through the same parameters."""
    place = {id(tensor): number for number, tensor in enumerate(everything)}
    words = []
    for number, each in enumerate(passes):
        reached = gathered.shards(reach(each.outputs).leaves)
        if each.outputs and not reached:
            raise ParameterError(
                f"tensors[{number}]",
                "a tensor that requires grad where parameters are divided among processes",
                "one without a graph",
                "The other processes would wait for its backward pass. Where a task is absent from "
                "a batch, make its loss 0 * output.sum().",
            )
        words.append(sorted(place[id(tensor)] for tensor in reached))
    if not meeting.agree_on(Stage.PASSES, words, [tuple(t.shape) for t in everything]):
        raise ParameterError(
            "tensors",
            "computed by the same parameters on all processes",
            f"{len(passes)} rows here that other processes do not have, or compute otherwise",
            "The processes would wait for one another. Where a task is absent from a batch, make "
            "its loss 0 * output.sum().",
        )


def _check_units(units: Sequence[Any]) -> None:
    for unit in units:
        waiting = any(p.unsharded_accumulated_grad is not None for p in unit.fsdp_params)
        if waiting or not (unit.reduce_grads and unit.all_reduce_grads):
            raise ParameterError(
                "tensors",
                "computed by fully_shard modules that reduce gradients",
                "one with set_requires_gradient_sync(False)",
                "Rows add up in .jac after they are reduced: leave it at True.",
            )


def _reduced(target: Tensor) -> Tensor:
    """What this process holds of the gradient of a tensor, as it holds the tensor."""
    gradient: Any = target.grad
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    spread: Any = target
    if is_dtensor(target) and gradient.placements != spread.placements:
        gradient = gradient.redistribute(spread.device_mesh, spread.placements)
    return local_part(gradient)


@contextmanager
def _kept_gathered(units: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """
    Keep parameters under FSDP2 gathered between passes, which gathers them once for all.

    :returns: Ends it, before the last pass.
    """
    before = [(unit, unit.reshard_after_backward) for unit in units]

    def end() -> None:
        for unit, reshard in before:
            unit.reshard_after_backward = reshard

    for unit in units:
        unit.reshard_after_backward = False
    try:
        yield end
    finally:
        end()
