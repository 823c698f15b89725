"""Hooks that hear of passes of ours alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore._fields import dense
from jdcore._handles import own_hooks
from jdcore.graph._saved import current_pass
from jdcore.graph._walk import edge_of


class OuterPass:
    """
    Tells a backward pass of ours from those that functions of the graph start inside it.

    Functions that differentiate in their own backward (implicit layers, adjoint methods) reach the
    same leaves as the pass around them. Hooks hear every pass, so those that serve ours ask here.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    @contextmanager
    def starting_at(self, outputs: Sequence[Tensor | GradientEdge]) -> Iterator[None]:
        """
        Notice passes that start at some outputs or places, for the time of a ``with`` block.

        Of all nodes, one of theirs is executed first, so what it notes is the number of our pass.
        """
        nodes = dict.fromkeys(
            edge_of(output)[0] if isinstance(output, Tensor) else output.node for output in outputs
        )
        with own_hooks(node.register_prehook(self._note) for node in nodes):
            yield

    def expect(self) -> None:
        """Say that the next pass is ours."""
        self._number = None

    def is_running(self) -> bool:
        """Whether the pass that calls, from a hook, is ours."""
        return current_pass() == self._number

    def _note(self, gradients: tuple[Tensor | None, ...]) -> None:
        del gradients
        # Later passes that reach this node are inner ones: they start while ours runs.
        if self._number is None:
            self._number = current_pass()


Place = TypeVar("Place")


@frozen
class Exit(Generic[Place]):
    """
    An operation of a head whose gradients leave the head.

    :param node: The operation.
    :param loss: The number of the loss whose head it belongs to.
    :param places: Where the gradients of its operands go, of those, by number, that leave the head.
    """

    node: Node
    loss: int
    places: Mapping[int, Place]


@contextmanager
def leaving(
    exits: Iterable[Exit[Place]],
    outputs: Sequence[Tensor | GradientEdge],
    receive: Callable[[Place, int, Tensor], object],
) -> Iterator[None]:
    """
    Tell what each loss sends out of its head, in one pass through heads with nothing in common.

    Where heads end, autograd would add their gradients up. So each is heard on its way there, and
    taken away.

    :param exits: The last operations of the heads.
    :param outputs: Where the passes start that are listened to, for the time of a ``with`` block.
    :param receive: Called with the place where a gradient goes, the number of the loss, and the
        gradient; several times where several operands of a head come from one place. The gradient
        may be that of another operand as well, or a buffer of a hook.
    """
    own = OuterPass()

    def hear(exit_: Exit[Place], grads: Sequence[Tensor | None], _: object) -> Any:
        if not own.is_running():
            return None
        left = list(grads)
        for operand, place in exit_.places.items():
            grad, left[operand] = left[operand], None
            if grad is not None:
                receive(place, exit_.loss, dense(grad))
        return tuple(left)

    # Of the operations before the end, not of the end itself: what arrives there is a sum already.
    made = (exit_.node.register_hook(partial(hear, exit_)) for exit_ in exits)
    with own.starting_at(outputs), own_hooks(made):
        yield
