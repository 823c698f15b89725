"""
Parameters without a layer of their own: class tokens, position embeddings, scales, projections.

They are served by the operations of the graph that use them, wherever these stand. The gradient at
the result of an operation and the operand that the operation saved are all that is needed. This
also serves attention and recurrent layers, whose forward passes are matrix products: nothing is
recomputed, and dropout, masks and packed projections need no attention here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import evolve, field, frozen
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from jdcore.autogram._call import widened
from jdcore.autogram.blocks import Block, OuterBlock, RowsBlock
from jdcore.autogram.rules import _fused_lstm as fused
from jdcore.graph import MATRIX_PRODUCTS, Unreadable, saved

__all__ = ["Operand", "Place", "Results", "block_of_use", "operands"]

Layout = str
"""Where the samples are: "major" (sample b owns the entries b * r to (b + 1) * r of the first
dimension), "minor" (every B-th entry of it, from b on) or "second" (the second dimension)."""

Place = tuple[Node, int]
"""A node of the graph and one of its outputs: where gradients are captured."""

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
        product = MATRIX_PRODUCTS.get(self.node.name())
        if product is not None and self.position == product[0]:
            return True
        if self.transposed:
            return False
        if self.node.name() == fused.FUSED_LSTM:
            return self.position in fused.OPERANDS and self.part is None
        if self.node.name() == "AddmmBackward0":
            return self.position == 0
        return self.node.name() in _BROADCASTING

    @property
    def places(self) -> tuple[Place, ...]:
        """Where gradients are needed."""
        outputs = fused.OUTPUTS if self.node.name() == fused.FUSED_LSTM else (0,)
        return tuple((self.node, output) for output in outputs)


@frozen(eq=False)
class Results:
    """
    What the backward passes brought.

    :param grads: Gradients at places, shape [K, ...].
    :param layouts: Where the samples are at each place; None where they mix.
    :param samples: B.
    """

    grads: Mapping[Place, Tensor]
    layouts: Mapping[Place, Layout | None]
    samples: int
    gates: dict[Node, fused.Gates | None] = field(factory=dict)
    """Of fused operations: all of their operands need the same."""

    def layout(self, place: Place) -> Layout | None:
        return self.layouts.get(place, "major")


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
            part = None if use.transposed or use.part is not None else _part(use.node, output)
            if part is None:
                yield use
                continue
            following = evolve(following, part=part)
        yield from operands(following, parents)


def _part(node: Any, output: int) -> tuple[int, int] | None:
    """The range of the first dimension that a split hands out, None if there is none."""
    try:
        if saved(node, "dim") != 0:
            return None
        if node.name() == "SplitBackward0":
            size, length = saved(node, "split_size"), saved(node, "self_sym_sizes")[0]
            return output * size, min(length, (output + 1) * size)
        sizes = saved(node, "split_sizes")
    except Unreadable:
        return None
    start = sum(sizes[:output])
    return start, start + sizes[output]


Factor = Callable[[Any, int, Tensor], Tensor]


def _times(grads: Tensor, factor: Tensor | float) -> Tensor:
    # A copy would stay in memory beside the original until the update.
    return grads if isinstance(factor, (int, float)) and factor == 1 else grads * factor


def _add(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else _times(grads, saved(node, "alpha"))


def _sub(node: Any, operand: int, grads: Tensor) -> Tensor:
    return grads if operand == 0 else _times(grads, -saved(node, "alpha"))


def _mul(node: Any, operand: int, grads: Tensor) -> Tensor:
    return _times(grads, saved(node, "other" if operand == 0 else "self"))


def _div(node: Any, operand: int, grads: Tensor) -> Tensor:
    if operand == 0:
        return _times(grads, 1.0 / saved(node, "other"))
    return _times(grads, -saved(node, "self") / saved(node, "other").square())


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


def block_of_use(parameter: Parameter, use: Operand, results: Results) -> Block | None:
    """
    The Jacobian through one operation.

    :returns: None if the operation is unknown, or used in a way that is not known here.
    """
    if not use.known or all(place not in results.grads for place in use.places):
        return None
    try:
        if use.node.name() == fused.FUSED_LSTM:
            return _fused(parameter, use, results)
        [place] = use.places
        layout, grads = results.layout(place), widened(results.grads[place])
        if layout is None or grads.ndim < 2:
            return None
        return _simple(parameter, use, grads, layout, results.samples)
    except Unreadable:
        return None


def _fused(parameter: Parameter, use: Operand, results: Results) -> Block | None:
    node, grads = use.node, [results.grads.get(place) for place in use.places]
    pairs = zip(use.places, grads, strict=True)
    layouts = [None if g is None else results.layout(place) or "mixed" for place, g in pairs]
    # Gradients of zero, as of a direction that no loss looks at, show no layout and need none.
    apart = fused.samples_apart(layouts, results.samples) or fused.samples_apart(
        [
            layout if g is not None and g.any() else None
            for layout, g in zip(layouts, grads, strict=True)
        ],
        results.samples,
    )
    if not apart:
        return None
    if node not in results.gates:
        results.gates[node] = fused.gates_of(node, grads)
    gates = results.gates[node]
    return None if gates is None else gates.block(parameter, use.position, results.samples)


def _simple(
    parameter: Parameter, use: Operand, grads: Tensor, layout: Layout, samples: int
) -> Block | None:
    product = MATRIX_PRODUCTS.get(use.node.name())
    if product is not None and use.position == product[0]:
        inputs = saved(use.node, product[1]).detach().to(grads.dtype)
        return _product(parameter, use, inputs, grads, layout, samples)
    if use.node.name() == "AddmmBackward0":
        if saved(use.node, "beta") != 1 or parameter.ndim != 1:
            return None
        return _bias(parameter, use, grads, layout, samples)
    factor = _BROADCASTING[use.node.name()](use.node, use.position, grads).detach()
    if use.part is not None or (layout == "second" and parameter.ndim == 1):
        return _bias(parameter, use, factor, layout, samples)
    return _broadcast(parameter, factor, layout, samples)


def _product(
    parameter: Parameter, use: Operand, inputs: Tensor, grads: Tensor, layout: Layout, samples: int
) -> Block | None:
    if layout == "second":
        return None
    if use.node.name() == "AddmmBackward0" and saved(use.node, "alpha") != 1:
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
