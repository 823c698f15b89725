"""
Differentiation where parameters are divided among processes.

Parameters under FSDP2 are gathered, if there is room for them and for their rows: then the passes
are those of one process. Else there is one accumulating backward pass for each row. The hooks of
FSDP2 reduce what such a pass accumulates; those of DTensor compute on gradients one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from jdcore._fields import dense, set_aside
from jdcore.distributed._gathering import can_be_gathered, divided_means, kept_gathered
from jdcore.distributed._grid import Grid
from jdcore.distributed._meeting import Meeting, Stage, telling
from jdcore.distributed._sharding import Gathered, is_dtensor, local_part, some_dtensor
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
    return some_dtensor(Gathered().shards(tensors))


def telling_holders(outputs: Sequence[Tensor], given: object) -> AbstractContextManager[None]:
    """
    Tell the processes with which this one holds parameters of an error before they meet.

    :param outputs: What is to be differentiated.
    :param given: What parameters were named, if any, not yet checked.
    """

    def meeting() -> Meeting | None:
        # Not checked yet: it may be anything.
        alone = isinstance(given, Tensor) or not isinstance(given, Iterable)
        named: Iterable[object] = [given] if alone else given  # type: ignore[assignment]
        computed = [output for output in outputs if output.grad_fn is not None]
        tensors = [t for t in (*reach(computed).leaves, *named) if isinstance(t, Tensor)]
        shards = [t for t in Gathered().shards(tensors) if is_dtensor(t)]
        return Meeting(Grid.of(shards).groups, shards[0].device) if shards else None

    return telling(meeting)


@frozen(eq=False)
class SpreadPasses:
    """
    Backward passes that processes make together, with what each of them would accumulate.

    :param passes: The passes. All processes must make the same, through the same modules.
    :param targets: The parameters that are wanted, sharded ones in the form that optimizers know.
    """

    passes: Sequence[Pass]
    targets: Sequence[Tensor]
    gathered: Gathered = field(factory=Gathered, init=False)
    everything: Sequence[Tensor] = field(init=False)
    """The targets and all other leaves behind the outputs."""

    @everything.default
    def _find_everything(self) -> Sequence[Tensor]:
        outputs = dict.fromkeys(output for each in self.passes for output in each.outputs)
        # All leaves, as a pass accumulates into those that nobody asked for, too.
        leaves = self.gathered.shards(reach(outputs).leaves)
        return list(dict.fromkeys([*self.targets, *leaves]))

    @property
    def grid(self) -> Grid:
        """The processes that hold all of these."""
        return Grid.of(self.everything)

    def meeting(self) -> Meeting:
        """A meeting of the processes."""
        return Meeting(self.grid.groups, self.everything[0].device)

    def check(self, meeting: Meeting, *, at_once: bool | None, fits: bool) -> bool:
        """
        Check that all processes are to make the same passes, and decide how.

        :param at_once: Whether the parameters are to be gathered; None leaves it to the library.
        :param fits: Whether there is room for the rows of all of them here.
        :returns: Whether they are to be gathered.
        :raises ParameterError: If the passes differ, or the parameters cannot be gathered although
            they are to be.
        :raises PeerError: If another process cannot take part.
        """
        _check_units(self.gathered.units(self.everything))
        able = can_be_gathered(self.gathered, self.everything)
        if at_once and not able:
            raise ParameterError(
                "parallel_chunk_size",
                "None or 1 where parameters are divided among processes by other means than "
                "fully_shard alone",
                "more",
                "DTensors, and communication that is not that of FSDP2, take gradients one at a "
                "time.",
            )
        # Before the passes: their hooks wait for the same hooks of the other processes, where no
        # error can be told.
        self._check_same(meeting, at_once)
        tight = not able or at_once is False or not (at_once or fits)
        return meeting.agree(Stage.PASSES, int(tight)) == [0]

    def _check_same(self, meeting: Meeting, at_once: bool | None) -> None:
        """Check that all processes are to make passes through the same parameters."""
        place = {id(tensor): number for number, tensor in enumerate(self.everything)}
        reached: dict[tuple[int, ...], list[int]] = {}
        words = []
        for number, each in enumerate(self.passes):
            key = tuple(map(id, each.outputs))
            if key not in reached:
                leaves = self.gathered.shards(reach(each.outputs).leaves)
                reached[key] = sorted(place[id(tensor)] for tensor in leaves)
            if each.outputs and not reached[key]:
                raise ParameterError(
                    f"tensors[{number}]",
                    "a tensor that requires grad where parameters are divided among processes",
                    "one without a graph",
                    "The other processes would wait for its backward pass. Where a task is absent "
                    "from a batch, make its loss 0 * output.sum().",
                )
            words.append(reached[key])
        shapes = [tuple(tensor.shape) for tensor in self.everything]
        if not meeting.agree_on(Stage.PASSES, words, shapes, at_once):
            raise ParameterError(
                "tensors",
                "computed by the same parameters on all processes",
                f"{len(self.passes)} rows here that other processes do not have, or compute "
                "otherwise",
                "The processes would wait for one another. Where a task is absent from a batch, "
                "make its loss 0 * output.sum().",
            )

    @torch.no_grad()
    def gather(
        self, meeting: Meeting, differentiate: Callable[[], Sequence[Mapping[Tensor, Tensor]]]
    ) -> list[dict[Tensor, Tensor]]:
        """
        Gather the parameters, differentiate, and divide what was found.

        :param differentiate: Gives rows [m, *S] by the leaves that stand for parameters in the
            graph, once or for several m.
        :returns: The same for each: means over processes, of what this process holds, by the
            parameters as optimizers know them.
        """
        meeting.agree(Stage.GATHER)
        # Rows are divided after this block: what is gathered is let go before more is made.
        with kept_gathered(self.gathered, self.everything):
            groups = differentiate()
        return [self._divided(meeting, found) for found in groups]

    def _divided(self, meeting: Meeting, found: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        rows = {self.gathered.shard(leaf): of_leaf for leaf, of_leaf in found.items()}
        spread = {tensor: of_leaf for tensor, of_leaf in rows.items() if is_dtensor(tensor)}
        return rows | divided_means(meeting, spread)

    @torch.no_grad()
    def run(self, retain_graph: bool, collect: Callable[[int, int, Tensor], object]) -> None:
        """
        Make the passes one by one; every ``.grad`` is left as it was.

        :param retain_graph: Whether the graph can be differentiated again afterwards.
        :param collect: Takes the number of the pass, the number of the target, and its gradient:
            what this process holds of it, in the placement of the target.
        """
        units = self.gathered.units(self.everything)
        # A row of zeros makes no pass: the graph is freed by the last one that does.
        last_number = max((n for n, each in enumerate(self.passes) if each.outputs), default=-1)
        with (
            set_aside(self.everything),
            self._given_up_on_error(),
            _kept_between_passes(units) as free,
        ):
            for number, each in enumerate(self.passes):
                if not each.outputs:
                    continue
                last = number == last_number
                # The last pass is an ordinary one, after which FSDP2 divides the parameters again.
                if last and not retain_graph:
                    free()
                with torch.enable_grad():
                    torch.autograd.backward(
                        each.outputs, each.cotangents, retain_graph=retain_graph or not last
                    )
                for place, target in enumerate(self.targets):
                    if target.grad is not None:
                        collect(number, place, _reduced(target))
                for tensor in self.everything:
                    # The next pass is to start from nothing, as what is collected is one row.
                    tensor.grad = None

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        """Let later passes not take themselves for parts of one that an error has stopped."""
        try:
            yield
        except BaseException:
            self.gathered.give_up_pass(self.everything)
            raise


def _check_units(units: Sequence[Any]) -> None:
    # Gradients that were accumulated without being reduced would be mixed with the first row.
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
    assert target.grad is not None
    # DTensor leaves a gradient in the placement that its operation gave it, such as a partial sum.
    gradient: Any = dense(target.grad)
    spread: Any = target
    if is_dtensor(target) and gradient.placements != spread.placements:
        gradient = gradient.redistribute(spread.device_mesh, spread.placements)
    return local_part(gradient)


@contextmanager
def _kept_between_passes(units: Sequence[Any]) -> Iterator[Callable[[], None]]:
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
