from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Size, Tensor

from jdcore.graph._cost import outer_ghost_beats_direct
from jdcore.graph._memory import pieces
from jdcore.graph.shares._ghost import summed_up
from jdcore.graph.shares._outer import Outer
from jdcore.graph.shares._product import product, scaled
from jdcore.graph.shares._share import Accumulator

_COPIED = 1 << 14  # entries

# Entries of weights from which on each weighted gradient is computed by itself.
_WIDE = 1 << 17


class OuterLayers:
    """
    What the weights of several layers of one form contribute to the Jacobian, for one task.

    On accelerators, where the launch of a small operation takes longer than the operation, they
    are computed together.

    :param share: With the layers in the place of tasks, and the inputs ``[n, B, T, i]`` of each.
    :param bias: The shape of a bias, if the weighted gradients of biases are wanted as well: each
        is the weight of one more input, which is 1.
    :param joined: Entries of weighted gradients that may be computed together.
    """

    def __init__(self, share: Outer, bias: Size | None, joined: int) -> None:
        assert isinstance(share.inputs, Tensor)  # tables are served one by one
        self._inputs, self._share, self._bias = share.inputs, share, bias
        self._joined = joined

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows of all layers."""
        inputs, grads = self._inputs, self._share.grads
        n, B, T, o = grads.shape
        i, ghost = inputs.shape[3], T == 1
        ghost = ghost or outer_ghost_beats_direct(1, B, T, i, o)
        # Of each layer there are matrices of positions, or rows twice.
        size = (B * T) ** 2 if ghost else B * i * o
        parts = pieces(n, gramian.memory.joined // (2 * size))
        for start, stop in parts:
            some = slice(start, stop) if len(parts) > 1 else ...
            if ghost:
                self._add_ghosts(inputs[some], grads[some], gramian)
            else:
                self._add_rows(inputs[some], grads[some], gramian)

    def _add_ghosts(self, inputs: Tensor, grads: Tensor, gramian: Accumulator) -> None:
        """By Gram matrices over positions."""
        T, plus = grads.shape[2], self._share.plus
        inputs, grads = inputs.flatten(1, 2), grads.flatten(1, 2)
        gram = product(inputs, inputs.mT)
        if plus:
            gram += plus
        found = product(grads, grads.mT).mul_(gram)
        gramian.pend(summed_up(found, T, gramian) if T > 1 else found)

    def _add_rows(self, inputs: Tensor, grads: Tensor, gramian: Accumulator) -> None:
        """By rows, those of several layers one behind the other."""
        n, B = grads.shape[:2]
        rows = product(inputs.flatten(0, 1).mT, grads.flatten(0, 1)).view(n, B, -1)
        gramian.add_rows(rows.transpose(0, 1).flatten(1))

    def weighted(self, weights: Tensor) -> list[Tensor]:
        """
        The weighted gradients of all weights, and behind them those of all biases.

        :param weights: Shape [1, B], in float64 where they are to be summed in float64.
        """
        inputs, grads, shape = self._inputs, self._share.grads, self._share.shape
        views: list[Tensor] = []
        if self._bias is not None:
            biases = product(weights.expand(grads.shape[0], *weights.shape), grads.flatten(1, 2))
            views += biases.view(-1, *self._bias).unbind()
        # The same scale for all of them, of the smaller factor.
        if inputs.shape[3] < grads.shape[3]:
            inputs = scaled(weights, inputs)
        else:
            grads = scaled(weights, grads)
        inputs, grads = inputs.flatten(1, 2), grads.flatten(1, 2)
        own: list[Tensor] = []
        if shape.numel() > _WIDE or len(inputs) * shape.numel() > self._joined:
            pairs = zip(inputs, grads, strict=True)
            own = [self._share.summed(*of_layer).view(shape) for of_layer in pairs]
        else:
            views[:0] = self._share.summed(inputs, grads).view(-1, *shape).unbind()
        # In memory of their own, by one call: to keep one of them must not keep all.
        return own + (list(torch._foreach_mul(views, 1.0)) if views else [])


class OuterBeside:
    """
    What the weights of several layers of the same inputs contribute to the Jacobian.

    They are one layer with the outputs of all: its Gramian takes the products of the inputs once.

    :param shares: Of one :func:`beside`.
    """

    def __init__(self, shares: Sequence[Outer]) -> None:
        first, *_ = shares
        self._shapes = [share.shape for share in shares]
        self._outputs = [share.grads.shape[3] for share in shares]
        self._whole = Outer(
            first.inputs,
            torch.cat([share.grads for share in shares], 3),
            grads_first=first.grads_first,
            shape=(sum(self._outputs), -1) if first.grads_first else (-1, sum(self._outputs)),
            plus=first.plus,
        )

    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows of all layers."""
        self._whole.add_gramian(gramian)

    def weighted(self, weights: Tensor) -> list[Tensor]:
        """
        The weighted gradients of all weights.

        :param weights: Shape [K, B], in float64 where they are to be summed in float64.
        """
        whole = self._whole.weighted(weights)
        parts = torch.split(whole, self._outputs, 0 if self._whole.grads_first else 1)
        # In memory of their own, by one call: to keep one of them must not keep all.
        own = torch._foreach_mul(parts, 1.0)
        return [part.reshape(shape) for part, shape in zip(own, self._shapes, strict=True)]


def beside(share: Outer) -> Hashable:
    """
    What shares have in common that are those of one layer with the outputs of all.

    :returns: None if it is faster by itself, as a copy of its gradients takes longer than calls.
    """
    inputs = share.inputs
    if not isinstance(inputs, Tensor) or share.grads.numel() > _COPIED:
        return None
    # What lies in the same place, while both are there, is the same, unless one of them is read as
    # the negative of what lies there, as the imaginary parts of conjugates are.
    place = inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs.device
    read = place, inputs.is_neg()
    return read, share.grads.shape[2], share.grads.dtype, share.grads_first, share.plus
