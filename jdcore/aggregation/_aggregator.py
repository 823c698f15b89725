from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, is_finite, nonfinite_rows
from jdcore.aggregation._source import GramianSource, as_weighting, check_losses, weigh
from jdcore.errors import NonFiniteError, ParameterError
from jdcore.linalg import combine
from jdcore.linalg._gramian import sum_cross_gramians, sum_gramians
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

    def __call__(
        self, matrix: Tensor, /, *, losses: Tensor | None = None, second: Tensor | None = None
    ) -> Tensor:
        """
        :param matrix: Jacobian, real floating Tensor [m, n].
        :param losses: Values of the objectives, Tensor [m], for methods that look at them.
        :param second: Jacobian of a second, independent batch, Tensor [m, n], for methods that look
            at the cross-Gramian. The update is a combination of the rows of the first.
        :returns: Update [n], same dtype and device.
        :raises ParameterError: If the matrix is not a real floating matrix, or an argument of the
            weighting does not fit it.
        :raises NonFiniteError: If the weighting asks for finite input and the matrix is not.
        :raises NonDifferentiableError: When differentiating through a non-differentiable method.
        """
        check_matrix(matrix)
        others = None if second is None else [second]
        [vector], _, source = _aggregate(self.weighting, [matrix], losses, others)
        return forbid_differentiation(self, matrix, vector) if source.asked else vector

    def aggregate_blocks(
        self,
        blocks: Sequence[Tensor],
        /,
        *,
        losses: Tensor | None = None,
        second: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """
        Aggregate the Jacobian given as column blocks, without putting them together.

        :param blocks: At least one matrix [m, n1], [m, n2], ...; their dtypes may differ.
        :param losses: As for a call.
        :param second: As for a call, as column blocks of the same shapes.
        :returns: Vectors [n1], [n2], ... in the dtypes of the blocks, and the weights [m] in the
            promoted dtype.
        :raises ParameterError: If a block is no real floating matrix or the numbers of rows differ.
        """
        check_blocks(blocks)
        vectors, weights, _ = _aggregate(
            self.weighting, [block.detach() for block in blocks], losses, second
        )
        dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
        return vectors, weights.to(blocks[0].device, dtype, copy=True)


def _aggregate(
    weighting: Weighting,
    blocks: Sequence[Tensor],
    losses: Tensor | None,
    second: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor, GramianSource]:
    m = len(blocks[0])
    jacobian = _Jacobian([block.detach() for block in blocks], check_second(second, blocks))
    source = GramianSource(
        rows=m,
        precision=min((block.dtype for block in blocks), key=lambda dtype: -torch.finfo(dtype).eps),
        device=blocks[0].device,
        compute=jacobian.gramian,
        losses=check_losses(losses, m),
        compute_cross=None if second is None else jacobian.cross_gramian,
        scale=lambda: jacobian.scale,
    )
    weights = weigh(weighting, source)
    if source.asked:
        weights = weights * jacobian.scale ** getattr(weighting, "scale_degree", 0)
        return [combine(weights, block) for block in jacobian.blocks], weights, source
    vectors = [combine(weights, block) for block in blocks]
    if not all(map(is_finite, vectors)):
        vectors, weights = _examine(weighting, blocks, vectors, weights)
    return vectors, weights, source


def check_second(second: Sequence[Tensor] | None, blocks: Sequence[Tensor]) -> list[Tensor] | None:
    """
    The column blocks of a second Jacobian, detached.

    :raises ParameterTypeError: If one of them is no real floating Tensor.
    :raises ParameterError: If they differ in shape from those of the first.
    """
    if second is None:
        return None
    for block in second:
        check_matrix(block, "second")
    shapes, got = ([list(block.shape) for block in given] for given in (blocks, second))
    if shapes != got:
        raise ParameterError("second", f"of shape {_shapes(shapes)}, as the first", _shapes(got))
    return [block.detach() for block in second]


def _shapes(shapes: list[list[int]]) -> str:
    return " and ".join(map(str, shapes))


@define(eq=False)
class _Jacobian:
    """
    Column blocks, those of a second batch, and what brings the squares of entries into range.

    :param scale: A power of two by which blocks are divided before they are multiplied.
    """

    blocks: list[Tensor]
    second: list[Tensor] | None = None
    scale: float = 1.0

    def gramian(self) -> Tensor:
        product = sum_gramians(self.blocks)
        if not len(product) or _in_range(self.blocks, float(product.diagonal().max())):
            return product
        self.scale = _power_of_two(self.blocks)
        return sum_gramians([block / self.scale for block in self.blocks])

    def cross_gramian(self) -> Tensor:
        second = self.second or []
        product = sum_cross_gramians(self.blocks, second)
        if not len(product) or _in_range(self.blocks + second, float(product.abs().max())):
            return product
        self.scale = _power_of_two(self.blocks + second)
        one, two = ([block / self.scale for block in part] for part in (self.blocks, second))
        return sum_cross_gramians(one, two)


def _in_range(blocks: list[Tensor], largest: float) -> bool:
    # Squares of narrower dtypes cannot leave the range.
    narrow = all(block.dtype != torch.float64 for block in blocks)
    return narrow or 1e-250 < largest < 1e250


def _power_of_two(blocks: list[Tensor]) -> float:
    """The scale of the largest entry; 1 if there is none that is positive and finite."""
    largest = max(float(block.abs().max()) if block.numel() else 0.0 for block in blocks)
    return 2.0 ** math.frexp(largest)[1] if 0.0 < largest < math.inf else 1.0


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
