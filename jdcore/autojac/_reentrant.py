"""
Rows through reentrant checkpoints (``torch.utils.checkpoint`` with ``use_reentrant=True``).

Such a checkpoint hides the parameters inside it from the graph and can only be differentiated by a
backward pass that accumulates into ``.grad``, so each row is taken from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.graph import Reach

_NODE = "CheckpointFunctionBackward"


def is_reentrant(found: Reach) -> bool:
    """Whether a graph passes through a reentrant checkpoint."""
    return any(node.name() == _NODE for node in found.nodes)


def refuse_default(parameter: str) -> ParameterError:
    """The error for parameters that cannot be found because a checkpoint hides them."""
    return ParameterError(
        parameter,
        "given where the graph passes through a reentrant checkpoint, which hides its parameters",
        "None",
        "Pass all parameters, or call torch.utils.checkpoint with use_reentrant=False.",
    )


def accumulated_gradients(
    leaves: Sequence[Tensor],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
) -> list[Tensor | None]:
    """
    One row, by an accumulating backward pass; every ``.grad`` is as before afterwards.

    :param leaves: Leaves that the graph shows.
    :param inputs: Must hold every parameter that a checkpoint hides.
    :param cotangents: Gradients of the outputs.
    """
    with _cleared_grads([*inputs, *leaves]):
        torch.autograd.backward(outputs, cotangents, retain_graph=retain_graph)
        return [tensor.grad for tensor in inputs]


@contextmanager
def _cleared_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [(tensor, tensor.grad) for tensor in dict.fromkeys(tensors)]
    for tensor, _ in before:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
