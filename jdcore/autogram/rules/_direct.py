"""
Parameters without a layer of their own: class tokens, position embeddings, scales, projections.

They are served by the operations of the graph that use them, wherever these stand. The gradient at
the result of an operation and the operand that the operation saved are all that is needed. This
also serves attention and recurrent layers, whose forward passes are matrix products: nothing is
recomputed, and dropout, masks and packed projections need no attention here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from attrs import evolve, frozen
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from jdcore.autogram.blocks import Block, OuterBlock, RowsBlock

__all__ = ["Operand", "block_of_use", "operands"]

Layout = str
"""Where the samples are: "major" (sample b owns the entries b * r to (b + 1) * r of the first
dimension), "minor" (every B-th entry of it, from b on) or "second" (the second dimension)."""

Parents = dict[Node, list[tuple[Node, int, int]]]
"""For operations that only rearrange a parameter: what uses their results, as which operand, and
which result."""

REARRANGING = frozenset(
    {"TBackward0", "ToCopyBackward0", "SplitBackward0", "SplitWithSizesBackward0"}
)


@frozen(eq=False)
class Operand:
    """
    A use of a parameter.

    :param node: The operation.
    :param position: Which operand of it the parameter is.
    :param part: The range of the first dimension of the parameter that is used, None for all.
    :param transposed: Whether it is used transposed.
    """

    node: Any
    position: int
    part: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def known(self) -> bool:
        """Whether the Jacobian of the operation is known here."""
        product = _PRODUCTS.get(self.node.name())
        if product is not None and self.position == product[0]:
            return True
        if self.transposed:
            return False
        if self.node.name() == "AddmmBackward0":
            return self.position == 0
        return self.node.name() in _BROADCASTING


def operands(use: Operand, parents: Parents) -> Iterator[Operand]:
    """Follow a parameter through operations that rearrange it, to those that compute with it."""
    name = use.node.name()
    if name not in REARRANGING:
        yield use
        return
    for node, position, output in parents.get(use.node, ()):
        following = evolve(use, node=node, position=position)
        if name == "TBackward0":
            following = evolve(following, transposed=not use.transposed)
        elif name.startswith("Split"):
            if use.node._saved_dim != 0 or use.transposed or use.part is not None:
                yield use
                continue
            following = evolve(following, part=_part(use.node, output))
        yield from operands(following, parents)


def _part(node: Any, output: int) -> tuple[int, int]:
    if node.name() == "SplitBackward0":
        size = node._saved_split_size
        length = node._saved_self_sym_sizes[0]
        return output * size, min(length, (output + 1) * size)
    sizes = node._saved_split_sizes
    start = sum(sizes[:output])
    return start, start + sizes[output]


Factor = Callable[[Any, int, Tensor], Tensor]


def _times(grads: Tensor, factor: Tensor | float) -> Tensor:
    return grads * factor


def _add(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else _times(grads, node._saved_alpha)


def _sub(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else _times(grads, -node._saved_alpha)


def _mul(node: Any, operand: int, grads: Tensor) -> Tensor:
    return _times(grads, node._saved_other if operand == 0 else node._saved_self)


def _div(node: Any, operand: int, grads: Tensor) -> Tensor:
    if operand == 0:
        return _times(grads, 1.0 / node._saved_other)
    return _times(grads, -node._saved_self / node._saved_other.square())


def _expand(node: Any, operand: int, grads: Tensor) -> Tensor:
    del node, operand
    return grads


_BROADCASTING: dict[str, Factor] = {
    "AddBackward0": _add,
    "SubBackward0": _sub,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
}
"""Node, operand and gradient [K, ...] to the gradient of the operand before broadcasting."""

_PRODUCTS = {"MmBackward0": (1, "_saved_self"), "AddmmBackward0": (2, "_saved_mat1")}
"""Matrix products: which operand is the weight, and where the other one is saved."""


def block_of_use(
    parameter: Parameter, use: Operand, grads: Tensor, layout: Layout, samples: int
) -> Block | None:
    """
    The Jacobian through one operation.

    :param grads: Gradients at the result of the operation, shape [K, N, ...].
    :param layout: Where the samples are in the result.
    :param samples: B.
    :returns: None if the operation is used in a way that is not known here.
    """
    product = _PRODUCTS.get(use.node.name())
    if product is not None and use.position == product[0]:
        inputs = getattr(use.node, product[1]).detach().to(grads.dtype)
        return _product(parameter, use, inputs, grads, layout, samples)
    if use.node.name() == "AddmmBackward0":
        if use.node._saved_beta != 1 or parameter.ndim != 1:
            return None
        return _bias(parameter, use, grads, layout, samples)
    factor = _BROADCASTING[use.node.name()](use.node, use.position, grads).detach()
    if use.part is not None or (layout == "second" and parameter.ndim == 1):
        return _bias(parameter, use, factor, layout, samples)
    return _broadcast(parameter, factor, layout, samples)


def _product(
    parameter: Parameter, use: Operand, inputs: Tensor, grads: Tensor, layout: Layout, samples: int
) -> Block | None:
    if layout == "second" or getattr(use.node, "_saved_alpha", 1) != 1:
        return None
    grads = samples_first(grads, layout, samples, leading=1)
    inputs = samples_first(inputs, layout, samples)
    if use.transposed:
        return OuterBlock(parameter, None, inputs, grads, use.part)
    if len(grads) > 1 or use.part is not None:
        return None
    # The weight lies as [i, o]: inputs and gradients change places.
    return OuterBlock(parameter, None, grads[0], inputs[None])


def _bias(
    parameter: Parameter, use: Operand, grads: Tensor, layout: Layout, samples: int
) -> Block | None:
    length = len(parameter) if use.part is None else use.part[1] - use.part[0]
    if parameter.ndim != 1 or grads.shape[-1] != length or grads.ndim < 3:
        return None
    return OuterBlock(
        None, parameter, *_no_inputs(samples_first(grads, layout, samples, 1)), use.part
    )


def _no_inputs(grads: Tensor) -> tuple[Tensor, Tensor]:
    _, B, T, _ = grads.shape
    return grads.new_empty(B, T, 0), grads


def _broadcast(parameter: Parameter, grads: Tensor, layout: Layout, samples: int) -> Block | None:
    if layout == "second":
        grads = grads.transpose(1, 2)
    # A parameter that reaches into the dimension of samples has no gradient per sample here.
    shape = (1,) * (grads.ndim - 1 - parameter.ndim) + tuple(parameter.shape)
    if len(shape) != grads.ndim - 1 or shape[0] != 1 or (layout == "second" and parameter.ndim > 1):
        return None
    K, N = grads.shape[:2]
    if layout == "minor":
        by_sample = grads.reshape(K, N // samples, samples, *grads.shape[2:]).transpose(1, 2)
    else:
        by_sample = grads.reshape(K, samples, -1, *grads.shape[2:])
    broadcast = [d + 2 for d, length in enumerate(shape) if d > 0 and length == 1]
    return RowsBlock(parameter, by_sample.sum([2, *broadcast]))


def samples_first(tensor: Tensor, layout: Layout, samples: int, leading: int = 0) -> Tensor:
    """
    Fold everything between sample and features into one dimension of positions.

    :param tensor: Shape [*leading, N, ..., features].
    :returns: Shape [*leading, B, T, features].
    """
    head, features = tensor.shape[:leading], tensor.shape[-1]
    if layout == "second":
        tensor = tensor.transpose(leading, leading + 1)
    if layout == "minor":
        folded = tensor.reshape(*head, -1, samples, *tensor.shape[leading + 1 :])
        tensor = folded.transpose(leading, leading + 1)
    return tensor.reshape(*head, samples, -1, features)
