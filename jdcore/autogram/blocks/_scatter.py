from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._scratch import CAPACITY, pieces
from jdcore.autogram.blocks._block import Block, Gradients, weighted_sum
from jdcore.autogram.blocks._ghost import contract


class ScatterBlock(Block):
    """
    Rows picked by index, as in an embedding: ``J_kb[index[b, t]] += grads[k, b, t]``.

    :param weight: The table [V, o].
    :param index: Shape [B, T], integer.
    :param grads: Shape [K, B, T, o].
    :param sparse: Whether the gradient of the table is sparse.
    """

    def __init__(self, weight: Parameter, index: Tensor, grads: Tensor, sparse: bool) -> None:
        self._weight, self._index, self._grads, self._sparse = weight, index, grads, sparse
        self.dtype = grads.dtype
        self.columns = ((weight, None),)

    def add_gramian(self, gramian: Accumulator) -> None:
        K, B, T, o = self._grads.shape
        used, place = torch.unique(self._index, return_inverse=True)
        R = K * B
        if R * len(used) < B * T * T or R * len(used) * o <= CAPACITY:
            for start, stop in pieces(o, CAPACITY // max(1, R * len(used))):
                rows = gramian.scratch.take((R * len(used), stop - start), self._grads).zero_()
                _scatter(rows, place, len(used), self._grads[..., start:stop])
                gramian.add_rows(rows.view(R, -1))
        else:
            self._add_ghost(gramian, place)

    def _add_ghost(self, gramian: Accumulator, place: Tensor) -> None:
        def same(start: int, stop: int) -> Tensor:
            rows, columns = place[start:stop].reshape(-1), place[:stop].reshape(-1)
            return (rows[:, None] == columns).to(self.dtype)

        for product, first in contract(same, self._grads):
            gramian.add(product, first)

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        grads = weighted_sum(weights, self._grads).flatten(0, 1)
        index = self._index.reshape(-1)
        if self._sparse:
            shape = self._weight.shape
            gradient = torch.sparse_coo_tensor(
                index[None], grads, shape, check_invariants=False, device=grads.device
            )
        else:
            gradient = grads.new_zeros(self._weight.shape).index_add_(0, index, grads)
        gradients.add(self.columns[0], gradient)

    def rows(self, start: int, stop: int) -> Tensor:
        K, B, _, o = self._grads.shape
        inside = (self._index >= start) & (self._index < stop)
        place = torch.where(inside, self._index - start, 0)
        grads = self._grads * inside[..., None]
        rows = grads.new_zeros(K * B * (stop - start), o)
        _scatter(rows, place, stop - start, grads)
        return rows.view(K * B, -1)

    def merged(self, others: Sequence[Block]) -> Block | None:
        blocks: list[ScatterBlock] = [self, *others]  # type: ignore[list-item]  # of the same class
        index = torch.cat([b._index for b in blocks], 1)
        grads = torch.cat([b._grads for b in blocks], 2)
        return ScatterBlock(self._weight, index, grads, all(b._sparse for b in blocks))


def _scatter(rows: Tensor, place: Tensor, length: int, grads: Tensor) -> None:
    K, B, T, _ = grads.shape
    offset = torch.arange(K * B, device=grads.device).view(K, B, 1) * length
    rows.index_add_(0, (offset + place).reshape(-1), grads.reshape(K * B * T, -1))
