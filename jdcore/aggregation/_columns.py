from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore._modes import refuse_tangents, without_graph
from jdcore.aggregation._finite import all_finite, nonfinite_rows
from jdcore.linalg._blas import small_combination
from jdcore.linalg._combine import combine, combine_blocks
from jdcore.linalg._gramian import gramian_and_rows, sum_cross_gramians, sum_gramians


class Columns:
    """
    The Jacobian of one step, as column blocks, and what an aggregator does with them.

    An aggregator that asks for nothing else works as well where the columns lie on several
    processes: there, a subclass answers for all of them.

    :param blocks: At least one matrix [m, n1], [m, n2], ...
    :param second: Those of a second batch, of the same shapes, for methods that look at the
        cross-Gramian.
    """

    # It is made at every step: what is fetched for that takes as long as to multiply a few rows.
    rows: int
    """Number of objectives m."""
    scale: float = 1.0
    """A power of two by which rows are divided before they are multiplied."""
    products: Tensor | None = None
    """The Gramian, once :meth:`gramian` was asked for it."""
    few: NDArray[np.float64] | None = None
    """The rows in float64, once their products were asked for, if they are few and short."""
    length: float = math.inf
    """What the rows that are few are not longer than, as one vector."""
    _wide: Tensor | None = None
    """The rows in float64, once their products were asked for, if they were converted at once."""

    def __init__(self, blocks: list[Tensor], second: list[Tensor] | None = None) -> None:
        self.blocks, self.second = blocks, second
        if blocks:
            self.rows = blocks[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the Jacobian."""
        return self.blocks[0].device

    @property
    def wide(self) -> bool:
        """Whether sums with weights in float64 are made in float64 anyway."""
        if self.few is not None or self._wide is not None:
            return True
        return self.precision == torch.float64

    @property
    def local(self) -> bool:
        """Whether all columns lie on this process, in ``blocks``."""
        return type(self) is Columns

    @property
    def precision(self) -> torch.dtype:
        """The narrowest dtype of the rows."""
        blocks = self.blocks
        return blocks[0].dtype if len(blocks) == 1 else narrowest([b.dtype for b in blocks])

    def rounded_to(self) -> torch.dtype:
        """The narrowest dtype that the rows were rounded to, see :func:`rounded_to`."""
        return narrowest([self.precision, *map(rounded_to, self.blocks)])

    def gramian(self) -> Tensor:
        """
        The Gramian of J divided by ``scale``, float64 Tensor [m, m].

        The scale keeps the squares of float64 entries in the range of float64.
        """
        result, blocks = self.product(1.0), self.blocks
        # Squares of narrower dtypes cannot leave the range.
        if len(blocks) != 1 or blocks[0].dtype == torch.float64:
            result = self._scaled(result, self.product)
        self.products = result
        return result

    def cross_gramian(self) -> Tensor:
        """The Gramian of the rows with those of the second batch, as :meth:`gramian`."""
        # A method may have asked for the Gramian before: there is one scale for both.
        if self.scale != 1.0:
            return self.cross_product(self.scale)
        return self._scaled(self.cross_product(1.0), self.cross_product)

    def _scaled(self, result: Tensor, product: Callable[[float], Tensor]) -> Tensor:
        """The result for scale 1, or that of the product for the scale that is needed."""
        narrow = all(block.dtype != torch.float64 for block in self.blocks)
        if not len(result) or narrow:
            return result
        # A Gramian has its largest entry on its diagonal.
        # Squares of entries that matter beside the largest one did not leave the range then.
        # Waits for an accelerator, but for float64 rows only.
        if 1e-250 < float(result.abs().max()) < 1e250:
            return result
        # Zero rows need no scale, and infinite ones have none: they are told elsewhere.
        largest = self.largest()
        if not 0.0 < largest < math.inf:
            return result
        self.scale = power_of_two(largest)
        return product(self.scale)

    def product(self, scale: float) -> Tensor:
        """The Gramian of the rows divided by ``scale``."""
        blocks = self.blocks
        refuse_tangents(blocks, "matrix")
        dtype = blocks[0].dtype
        # What is differentiable is to stay so, for those who ask for the derivative to be told.
        if (
            type(self) is not Columns
            or scale != 1.0
            or dtype == torch.float64
            or any(block.requires_grad or block.dtype is not dtype for block in blocks)
        ):
            return sum_gramians(_divided(blocks, scale))
        gramian, self._wide = gramian_and_rows(blocks)
        return gramian

    def cross_product(self, scale: float) -> Tensor:
        """The Gramian of the rows with those of the second batch, both divided by ``scale``."""
        refuse_tangents([*self.blocks, *(self.second or [])], "matrix")
        one, two = (_divided(blocks, scale) for blocks in (self.blocks, self.second or []))
        return sum_cross_gramians(one, two)

    def largest(self) -> float:
        """The largest magnitude of an entry."""
        blocks = [*self.blocks, *(self.second or [])]
        return max(float(block.abs().max()) if block.numel() else 0.0 for block in blocks)

    def agreed(self, weights: Tensor) -> Tensor:
        """The weights that all processes take, of those that each has found."""
        return weights

    def combine(self, weights: Tensor, *, wide: bool = False) -> list[Tensor]:
        """
        One weighted sum of the rows of each block, in its dtype.

        :param wide: Whether to multiply in float64, whatever the dtypes of the blocks.
        """
        few, rows, blocks = self.few, self._wide, self.blocks
        # Rows that are few are in the cache already, in float64, since their Gramian was made.
        if few is not None and weights.is_cpu and weights.dtype == torch.float64:
            vector = small_combination(weights.numpy(), few, torch.float32, self.length)
        elif rows is not None:
            if not (weights.is_cpu and rows.is_cpu and weights.dtype is rows.dtype):
                weights = weights.to(rows.device, rows.dtype)
            vector = rows.T.mv(weights)
            narrow = blocks[0].dtype  # `float` takes half of the time of `to`
            vector = vector.float() if narrow is torch.float32 else vector.to(narrow)
        elif len(blocks) == 1:
            vector = combine(weights, blocks[0], wide=wide)
        else:
            return combine_blocks(weights, blocks, wide=wide)
        if len(blocks) == 1:
            return [vector]
        return list(torch.split(vector, [block.shape[1] for block in blocks]))

    def apply(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """
        Treat every column by itself.

        :param function: From a matrix [m, k] to a vector [k] of the same dtype.
        :returns: One vector for each block.
        """
        return [function(block) for block in self.blocks]

    def filled(self, value: float) -> list[Tensor]:
        """Vectors of equal entries, as :meth:`apply` gives."""
        return self.apply(lambda block: block.new_full(block.shape[1:], value))

    def inner(self, vectors: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """
        What :meth:`apply` returned, measured against the rows, all divided by ``scale``.

        :param vectors: That result.
        :returns: The inner products [m] with the rows, and the squared length, in float64.
        """
        blocks, vectors = _divided(self.blocks, scale), _divided(list(vectors), scale)
        pairs = [(b.double(), v.double()) for b, v in zip(blocks, vectors, strict=True)]
        products = torch.stack([(b @ v).to(self.device) for b, v in pairs]).sum(0)
        return products, torch.stack([(v @ v).to(self.device) for _, v in pairs]).sum()

    def finite(self) -> bool:
        """Whether every entry is finite."""
        return all_finite(self.blocks)

    def nonfinite_rows(self) -> list[int]:
        """Indices of the rows with a non-finite entry."""
        return nonfinite_rows(self.blocks)


def _divided(blocks: list[Tensor], scale: float) -> list[Tensor]:
    # Asked first: a call for each of many blocks costs as much as what is done with them.
    detached = [without_graph(block) if block.requires_grad else block for block in blocks]
    # Float32 blocks beside float64 ones cannot hold such a scale: it would be zero or infinite.
    return detached if scale == 1.0 else [block.double() / scale for block in detached]


def narrowest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the lowest precision among some."""
    first = dtypes[0]
    if dtypes.count(first) == len(dtypes):
        return first
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def widest(blocks: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the entries of all blocks."""
    return reduce(torch.promote_types, dict.fromkeys(block.dtype for block in blocks))


def rounded_to(block: Tensor) -> torch.dtype:
    """
    The dtype that the entries of a matrix were rounded to: its own, usually.

    Float64 numbers that fill the 24 bits of float32 and no more were converted from there, and the
    rows are known no better than that. Numbers of a few digits are taken to be exact.
    """
    # The first entries tell, but for zeros and the like.
    if block.dtype != torch.float64 or not (_are_narrow(block[:1, :16]) and _are_narrow(block)):
        return block.dtype
    # Half of the entries is enough, as zeros and round numbers occur among rounded ones.
    narrow = block.float()
    # The last 8 of the 24 bits: numbers of a few digits (0.5, 3, 1e2) have zeros there.
    filled = torch.count_nonzero(narrow.view(torch.int32) & 0xFF)
    return torch.float32 if 2 * filled > torch.count_nonzero(narrow) else torch.float64


def _are_narrow(block: Tensor) -> bool:
    return torch.equal(block.float().double(), block)


def power(scale: float, degree: float) -> float:
    """``scale ** degree``; infinite where that leaves the range of float64, not an error."""
    try:
        return float(scale**degree)
    except OverflowError:
        return math.inf


def power_of_two(largest: float) -> float:
    """A scale for numbers up to a positive one: to divide and to multiply by it rounds nothing."""
    return float(2.0 ** (math.frexp(largest)[1] - 1))
