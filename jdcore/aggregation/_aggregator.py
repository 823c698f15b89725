from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, is_finite, nonfinite_rows
from jdcore.aggregation._source import GramianSource, as_weighting, weigh
from jdcore.errors import NonFiniteError
from jdcore.linalg import combine
from jdcore.linalg._gramian import sum_gramians
from jdcore.protocols import Weighting
from jdcore.validators import check_blocks, check_matrix


@define(eq=False)
class GramianAggregator:
    """
    The aggregator of a weighting: Gramian, weights, weighted sum of the rows.

    Every Gramian method uses this one implementation, so it works with autojac (block by block,
    without concatenating Jacobians) and with autogram alike.

    :param weighting: Any :class:`~jdcore.Weighting`, also a plain function, or an aggregator made
        of one.
    :raises ParameterTypeError: If it is an aggregator that needs the Jacobian itself.

    >>> import torch
    >>> from jdcore.aggregation import GramianAggregator, MeanWeighting
    >>> GramianAggregator(MeanWeighting())(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """

    weighting: Weighting = field(converter=as_weighting)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """
        :param matrix: Jacobian, real floating Tensor [m, n].
        :returns: Update [n], same dtype and device.
        :raises ParameterError: If the matrix is not a real floating matrix, or an argument of the
            weighting does not fit it.
        :raises NonFiniteError: If the weighting asks for finite input and the matrix is not.
        :raises NonDifferentiableError: When differentiating through a non-differentiable method.
        """
        check_matrix(matrix)
        [vector], _, source = _aggregate(self.weighting, [matrix])
        return forbid_differentiation(self, matrix, vector) if source.asked else vector

    def aggregate_blocks(self, blocks: Sequence[Tensor], /) -> tuple[list[Tensor], Tensor]:
        """
        Aggregate the Jacobian given as column blocks, without putting them together.

        :param blocks: At least one matrix [m, n1], [m, n2], ...; their dtypes may differ.
        :returns: Vectors [n1], [n2], ... in the dtypes of the blocks, and the weights [m] in the
            promoted dtype.
        :raises ParameterError: If a block is no real floating matrix or the numbers of rows differ.
        """
        check_blocks(blocks)
        vectors, weights, _ = _aggregate(self.weighting, [block.detach() for block in blocks])
        dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
        return vectors, weights.to(blocks[0].device, dtype, copy=True)


def _aggregate(
    weighting: Weighting, blocks: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, GramianSource]:
    jacobian = _Jacobian([block.detach() for block in blocks])
    source = GramianSource(
        rows=len(blocks[0]),
        precision=min((block.dtype for block in blocks), key=lambda dtype: -torch.finfo(dtype).eps),
        device=blocks[0].device,
        compute=jacobian.gramian,
    )
    weights = weigh(weighting, source)
    if source.asked:
        weights = weights * jacobian.scale ** getattr(weighting, "scale_degree", 0)
        return [combine(weights, block) for block in jacobian.blocks], weights, source
    vectors = [combine(weights, block) for block in blocks]
    if not all(map(is_finite, vectors)):
        vectors, weights = _examine(weighting, blocks, vectors, weights)
    return vectors, weights, source


@define(eq=False)
class _Jacobian:
    """Column blocks, and a power of two that brings the squares of their entries into range."""

    blocks: list[Tensor]
    scale: float = 1.0

    def gramian(self) -> Tensor:
        product = sum_gramians(self.blocks)
        if not len(product) or all(block.dtype != torch.float64 for block in self.blocks):
            return product  # squares of narrower dtypes cannot leave the range
        if 1e-250 < float(product.diagonal().max()) < 1e250:
            return product
        largest = max(float(block.abs().max()) if block.numel() else 0.0 for block in self.blocks)
        if not 0.0 < largest < math.inf:
            return product
        self.scale = 2.0 ** math.frexp(largest)[1]
        return sum_gramians([block / self.scale for block in self.blocks])


def _examine(
    weighting: Weighting, blocks: Sequence[Tensor], vectors: list[Tensor], weights: Tensor
) -> tuple[list[Tensor], Tensor]:
    """What weights that do not depend on the rows answer where the vectors are not finite."""
    rows = nonfinite_rows(blocks)
    if not rows:
        return vectors, weights  # a finite sum that overflowed in its own dtype
    if finite_required(getattr(weighting, "check_finite", None)):
        raise NonFiniteError(rows)
    return [vector * math.nan for vector in vectors], weights * math.nan
