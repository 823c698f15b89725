"""
Parameters that a module uses itself, beside its layers: class tokens, position embeddings, scales.

They are served by the operation that uses them: the gradient at its result, summed over what was
broadcast but not over samples, is the Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram.blocks import Block, OuterBlock, RowsBlock

__all__ = ["OPERATIONS", "block_of_use"]

Factor = Callable[[Any, int, Tensor], "Tensor | None"]
"""Node, operand and gradient [K, N, ...] to the gradient of the broadcast operand, if it is known."""


def _add(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else grads * node._saved_alpha


def _sub(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else grads * -node._saved_alpha


def _mul(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads * (node._saved_other if operand == 0 else node._saved_self)


def _div(node: Any, operand: int, grads: Tensor) -> Tensor | None:
    return grads / node._saved_other if operand == 0 else None


def _expand(node: Any, operand: int, grads: Tensor) -> Tensor:
    del node, operand
    return grads


OPERATIONS: dict[str, Factor] = {
    "AddBackward0": _add,
    "SubBackward0": _sub,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
}


def supported(node: Any) -> bool:
    """Whether the operation is one whose Jacobian is known here."""
    return node.name() in OPERATIONS or node.name() == "MmBackward0"


def block_of_use(
    parameter: Parameter, node: Any, operand: int, grads: Tensor, samples: int
) -> Block | None:
    """
    The Jacobian through one operation.

    :param grads: Gradients at the result of the operation, shape [K, N, ...].
    :param samples: B; N is a multiple of it.
    :returns: None if the operation is used in a way that is not known here.
    """
    if node.name() == "MmBackward0":
        return _matrix_product(parameter, node, operand, grads, samples)
    # A parameter that reaches into the dimension of samples has no gradient per sample here.
    shape = (1,) * (grads.ndim - 1 - parameter.ndim) + tuple(parameter.shape)
    if len(shape) != grads.ndim - 1 or shape[0] != 1:
        return None
    factor = OPERATIONS[node.name()](node, operand, grads)
    if factor is None:
        return None
    K = len(grads)
    by_sample = factor.reshape(K, samples, -1, *factor.shape[2:])
    broadcast = [d + 2 for d, length in enumerate(shape) if d > 0 and length == 1]
    return RowsBlock(parameter, by_sample.sum([2, *broadcast]))


def _matrix_product(
    parameter: Parameter, node: Any, operand: int, grads: Tensor, samples: int
) -> Block | None:
    K, N = grads.shape[:2]
    if operand != 1 or grads.ndim != 3 or N % samples:
        return None
    inputs = node._saved_self.to(grads.dtype).reshape(samples, -1, parameter.shape[0])
    if K == 1:
        # The weight lies as [i, o], so input and output gradient change places.
        return OuterBlock(parameter, None, grads.reshape(samples, N // samples, -1), inputs[None])
    return None
