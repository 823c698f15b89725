"""Hooks that hear of passes of ours alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import GradientEdge

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
