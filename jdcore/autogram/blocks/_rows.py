from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram.blocks._block import Block, Gradients


class RowsBlock(Block):
    """
    The rows themselves, for parameters so small that nothing is gained by a factored form.

    :param parameter: The parameter.
    :param rows: Shape ``[K, B, *parameter.shape]``, or anything that has as many entries per row.
    """

    def __init__(self, parameter: Parameter, rows: Tensor) -> None:
        self.columns = ((parameter, None),)
        self._rows = rows
        self.dtype = rows.dtype

    def add_gramian(self, gramian: Accumulator) -> None:
        gramian.add_rows(self._flat())

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        gradients.add(self.columns[0], weights.reshape(-1) @ self._flat())

    def rows(self, start: int, stop: int) -> Tensor:
        flat = self._flat()
        parameter, _ = self.columns[0]
        length = parameter.shape[0] if parameter.ndim else 1
        return flat.reshape(len(flat), length, -1)[:, start:stop].flatten(1)

    def merged(self, others: Sequence[Block]) -> Block | None:
        total = self._flat()
        for other in others:
            total = total + other._flat()  # type: ignore[attr-defined]  # of the same class
        K, B = self._rows.shape[:2]
        return RowsBlock(self.columns[0][0], total.reshape(K, B, -1))

    def _flat(self) -> Tensor:
        return self._rows.reshape(self._rows.shape[0] * self._rows.shape[1], -1)
