"""
Gradients that only accumulating passes show.

A reentrant checkpoint (``torch.utils.checkpoint`` with ``use_reentrant=True``) and the blocks of
reversible networks do not take their parameters as arguments. They hide them in a backward pass of
their own, which accumulates into the ``.grad`` of these, so each row is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from jdcore._fields import grad_versions, set_aside
from jdcore._handles import own_hooks
from jdcore.errors import UnservedGraphError
from jdcore.graph import Reach, edge_of
from jdcore.graph._functions import kept_leaves
from jdcore.graph._hooks import has_hook_for_several
from jdcore.graph._nesting import OuterPass
from jdcore.graph._walk import REENTRANT
from jdcore.validators import describe_tensor

# Most leaves have none: to ask this way takes no call of Python for each.
_hooks_of: Callable[[Tensor], dict[int, Any] | None] = attrgetter("_backward_hooks")


def is_reentrant(graph: Reach) -> bool:
    """Whether a graph passes through a reentrant checkpoint."""
    return any(node.name() == REENTRANT for node in graph.functions)


def default_error(parameter: str) -> UnservedGraphError:
    """The error for parameters that cannot be found because a checkpoint hides them."""
    return UnservedGraphError(
        "a reentrant checkpoint",
        "it hides the parameters inside it",
        "Pass all parameters, or call torch.utils.checkpoint with use_reentrant=False.",
        parameter,
        "given where the graph does not show all parameters",
    )


def may_reach(graph: Reach, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of some tensors that a graph reaches or may hide."""
    # What a checkpoint runs again is not known before it does, so that any tensor may be inside.
    if is_reentrant(graph):
        return list(tensors)
    hidden = set(map(id, kept_leaves(graph.functions)))
    return [tensor for tensor in tensors if graph.reaches(tensor) or id(tensor) in hidden]


def hides(graph: Reach, tensors: Iterable[Tensor]) -> bool:
    """Whether some tensors may get gradients in a way that only accumulating passes show."""
    # torch tells these hooks only of leaves that a pass accumulates into; others raise.
    if any(map(_hooks_of, graph.leaves)) and any(
        has_hook_for_several(leaf, "all") for leaf in graph.leaves
    ):
        return True
    if not graph.functions:
        return False
    return is_reentrant(graph) or not set(kept_leaves(graph.functions)).isdisjoint(tensors)


@contextmanager
def guarded(leaves: Iterable[Tensor], *, custom: bool) -> Iterator[None]:
    """
    Refuse passes in which functions change the ``.grad`` of leaves, as the rows would lack it.

    :param leaves: The leaves that are watched.
    :param custom: Whether the graph holds custom functions. Then the ``.grad`` fields are taken
        away meanwhile, so that they are as before also where the passes are refused.
    :raises UnservedGraphError: At the end of the block, if the ``.grad`` of a leaf changed.
    """
    watched = list(leaves)
    with set_aside(watched) if custom else nullcontext():
        # Versions, as an addition in place leaves the same tensor there.
        before = grad_versions(watched)
        yield
        changed = _changed(watched, before)
    if changed:  # raised where the fields are as before
        raise UnservedGraphError(
            f"a function that accumulates into the .grad of {describe_tensor(changed[0])}",
            "it does not return this gradient, as in a reversible block",
            "Pass all parameters, and let the function take its parameters as arguments or keep "
            "its modules as attributes of ctx.",
            "inputs",
            "all parameters where the graph does not show all of them",
        )


def _changed(leaves: list[Tensor], before: list[tuple[Tensor | None, int]]) -> list[Tensor]:
    changed = []
    triples = zip(leaves, before, grad_versions(leaves), strict=True)
    for leaf, (old, old_version), (new, version) in triples:
        # A function may add in place, which changes the version, or set another tensor.
        if new is not old or version != old_version:
            changed.append(leaf)
            if old is None:
                leaf.grad = None
    return changed


class AccumulatedRows:
    """
    Rows by accumulating backward passes, one at a time.

    :param inputs: Must hold every parameter that is hidden. Those that are no leaves are listened
        to.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._leaves = [(i, tensor) for i, tensor in enumerate(inputs) if tensor.is_leaf]
        self._others = [(i, tensor) for i, tensor in enumerate(inputs) if not tensor.is_leaf]
        self._heard: dict[int, Tensor] = {}
        self._pass = OuterPass()
        self._count = len(inputs)

    @contextmanager
    def open(self, outputs: Sequence[Tensor], leaves: Iterable[Tensor]) -> Iterator[None]:
        """
        Leave every ``.grad`` as it is, for the time of a ``with`` block.

        :param outputs: Where all passes start.
        :param leaves: All leaves that may accumulate.
        """
        aside = dict.fromkeys([*leaves, *(leaf for _, leaf in self._leaves)])
        places = [(i, *edge_of(tensor)) for i, tensor in self._others]
        heard = (node.register_prehook(partial(self._hear, i, at)) for i, node, at in places)
        # After the hook that notes the pass, for inputs that are outputs as well.
        with set_aside(aside), self._pass.starting_at(outputs), own_hooks(heard):
            yield

    def row(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """The gradients of the inputs, None where nothing arrived."""
        self._pass.expect()
        torch.autograd.backward(outputs, cotangents, retain_graph=retain_graph)
        gradients: list[Tensor | None] = [None] * self._count
        for i, leaf in self._leaves:
            # Taken away, as torch would add the next row to the same tensor.
            gradients[i], leaf.grad = leaf.grad, None
        for i, _ in self._others:
            gradients[i] = self._heard.pop(i, None)
        return gradients

    def _hear(self, i: int, position: int, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[position]
        if gradient is not None and self._pass.is_running():
            self._heard[i] = gradient
