from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._cost import outer_ghost_beats_direct
from jdcore.autogram._scratch import CAPACITY, pieces
from jdcore.autogram.blocks._block import Block, Gradients, weighted_sum
from jdcore.autogram.blocks._ghost import contract, linear_gram


class OuterBlock(Block):
    """
    Sums of outer products, as in a linear layer: ``J_kb = sum_t grads[k, b, t] inputs[b, t]ᵀ``.

    :param weight: The weight [o, i], None if its Jacobian is not wanted.
    :param bias: The bias [o], None if its Jacobian is not wanted.
    :param inputs: Shape [B, T, i].
    :param grads: Shape [K, B, T, o].
    :param part: First and last (excluded) of the rows of weight and bias that are meant, None for
        all.
    """

    def __init__(
        self,
        weight: Parameter | None,
        bias: Parameter | None,
        inputs: Tensor,
        grads: Tensor,
        part: tuple[int, int] | None = None,
    ) -> None:
        self._weight, self._bias, self._part = weight, bias, part
        self._inputs, self._grads = inputs, grads
        self.dtype = grads.dtype
        self.columns = tuple((p, part) for p in (weight, bias) if p is not None)

    def add_gramian(self, gramian: Accumulator) -> None:
        K, B, T, o = self._grads.shape
        if self._weight is None:
            self._add_bias(gramian)
        elif T == 1:
            # The bias is the weight of one more input, which is 1.
            self._add_ghost(gramian, 0.0 if self._bias is None else 1.0)
        else:
            self._add_bias(gramian)
            if outer_ghost_beats_direct(K, B, T, self._inputs.shape[-1], o):
                self._add_ghost(gramian)
            else:
                self._add_direct(gramian)

    def _add_bias(self, gramian: Accumulator) -> None:
        if self._bias is not None:
            gramian.add_rows(self._grads.sum(2).flatten(0, 1))

    def _add_ghost(self, gramian: Accumulator, plus: float = 0.0) -> None:
        for product, first in contract(linear_gram(self._inputs, plus), self._grads):
            gramian.add(product, first)

    def _add_direct(self, gramian: Accumulator) -> None:
        K, B, T, o = self._grads.shape
        grads = self._grads.reshape(K, B, T, o)
        for start, stop in pieces(self._inputs.shape[-1], CAPACITY // (K * B * o)):
            inputs = self._inputs[..., start:stop].transpose(1, 2)
            rows = gramian.scratch.rows((K, B, stop - start, o), grads)
            for k in range(K):
                torch.bmm(inputs, grads[k], out=rows[k])
            gramian.add_rows(rows.flatten(2).flatten(0, 1))

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        grads = weighted_sum(weights, self._grads).flatten(0, 1)
        if self._weight is not None:
            gradients.add((self._weight, self._part), grads.T @ self._inputs.flatten(0, 1))
        if self._bias is not None:
            gradients.add((self._bias, self._part), grads.sum(0))

    def rows(self, start: int, stop: int) -> Tensor:
        offset = 0 if self._part is None else self._part[0]
        length = self._grads.shape[-1]
        chosen = slice(max(0, start - offset), max(0, min(length, stop - offset)))
        rows = self._rows_of(self._grads[..., chosen])
        if self._part is None:
            return rows.flatten(0, 1).flatten(1)
        whole = rows.new_zeros(*rows.shape[:2], stop - start, *rows.shape[3:])
        shift = max(0, offset - start)
        whole[:, :, shift : shift + rows.shape[2]] = rows
        return whole.flatten(0, 1).flatten(1)

    def _rows_of(self, grads: Tensor) -> Tensor:
        if self._weight is None:
            return grads.sum(2)
        return torch.einsum("kbto,bti->kboi", grads, self._inputs)

    def split(self) -> list[Block]:
        alone = [(self._weight, None), (None, self._bias)]
        return [
            OuterBlock(weight, bias, self._inputs, self._grads, self._part)
            for weight, bias in alone
            if weight is not None or bias is not None
        ]

    def merged(self, others: Sequence[Block]) -> Block | None:
        blocks: list[OuterBlock] = [self, *others]  # type: ignore[list-item]  # of the same class
        inputs = torch.cat([b._inputs for b in blocks], 1)
        grads = torch.cat([b._grads for b in blocks], 2)
        return OuterBlock(self._weight, self._bias, inputs, grads, self._part)
