from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import define
from torch import Tensor

from jdcore.aggregation._answers import checked_vectors
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._matrix_aggregator import MatrixAggregator
from jdcore.errors import left_out

# Entries handled at once: few enough to stay in the cache of a CPU through several passes over
# them, enough to occupy an accelerator.
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 17, 1 << 24


def portions(block: Tensor) -> Iterator[slice]:
    """Cuts of the columns of a block into portions that are handled at once."""
    rows, columns = block.shape
    step = max(1, _at_once(block) // max(1, rows))
    for start in range(0, columns, step):
        yield slice(start, start + step)


def _widened(block: Tensor) -> Tensor:
    return block if block.dtype in (torch.float32, torch.float64) else block.float()


def _at_once(block: Tensor) -> int:
    return _ENTRIES if block.is_cpu else _ENTRIES_ELSEWHERE


@define(eq=False)
class CoordinatewiseAggregator(MatrixAggregator):
    """
    Base class of aggregators that treat every column of the Jacobian by itself.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`compute` on some
    columns and need not think of half precision, of empty or non-finite input, nor of
    differentiation. Columns come in portions, so memory stays bounded and Jacobians of single
    parameters are never concatenated. A field whose validator is
    :func:`jdcore.validators.row_vector` is checked against the rows and the device at each call.
    """

    def compute(self, columns: Tensor) -> Tensor:
        """
        :param columns: Finite Tensor [m, k] of float32 or float64 with m, k >= 1. Must not be
            modified.
        :returns: The aggregation of each column, Tensor [k].
        """
        raise left_out(self, "compute")

    def aggregate_finite(self, columns: Columns) -> list[Tensor]:
        return columns.apply(self._aggregate_block)

    def _aggregate_block(self, block: Tensor) -> Tensor:
        if 0 < block.numel() <= _at_once(block):
            vector = self._computed(_widened(block))
            return vector if vector.dtype == block.dtype else vector.to(block.dtype)
        vector = block.new_empty(block.shape[1])
        for cut in portions(block):
            vector[cut] = self._computed(_widened(block[:, cut]))
        return vector

    def _computed(self, columns: Tensor) -> Tensor:
        # What is broadcast would be taken for the vector.
        return checked_vectors([self.compute(columns)], [columns])[0]
