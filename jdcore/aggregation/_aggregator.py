from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

from attrs import define, field
from torch import Tensor

from jdcore._modes import without_graph
from jdcore.aggregation._columns import Columns, widest
from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import all_finite, finite_required, is_finite
from jdcore.aggregation._nested_state import restorer, stateful_part, stateless
from jdcore.aggregation._observation import observed
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._scalarization import looks_at_no_row
from jdcore.aggregation._source import ColumnsSource, GramianSource
from jdcore.aggregation._weigh import as_weighting, checked, combined, weigh
from jdcore.errors import NonFiniteError
from jdcore.linalg import combine
from jdcore.linalg._combine import sent
from jdcore.protocols import Weighting
from jdcore.validators import check_blocks, check_matrix, check_second


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

    @on_numbers
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
        weighting = self.weighting
        if losses is second is None and looks_at_no_row[ref(type(weighting))] and not observed():
            return _combine(weighting, matrix)
        others = None if second is None else check_second([second], [matrix])
        [vector], _, source = _aggregate(weighting, Columns([matrix], others), losses)
        if not source.asked or not vector.requires_grad:
            # The vector of a scalarization is differentiable: its weights are constants.
            return vector
        return forbid_differentiation(self, matrix, vector.detach())

    @on_numbers
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
        detached = [without_graph(block) if block.requires_grad else block for block in blocks]
        columns = Columns(detached, check_second(second, blocks))
        vectors, weights = self.aggregate_columns(columns, losses=losses)
        return vectors, sent(weights, blocks[0].device, widest(blocks), copy=True)

    def aggregate_columns(
        self, columns: Columns, /, *, losses: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """
        Aggregate a Jacobian whose columns may lie on several processes.

        :param columns: The Jacobian.
        :param losses: As for a call.
        :returns: The vectors that it puts together, and the weights [m].
        """
        vectors, weights, _ = _aggregate(self.weighting, columns, losses)
        return vectors, weights


def _combine(weighting: Any, matrix: Tensor) -> Tensor:
    """:func:`_aggregate` for weights that depend on no row, in two thirds of the time."""
    m = matrix.shape[0]
    weights = checked(weighting.weigh_rows(m, matrix.dtype, matrix), (m,))
    vector = combine(weights, matrix)
    if is_finite(vector):
        return vector
    columns = Columns([matrix])
    [vector], _ = _examine(weighting, columns, ColumnsSource(columns), [vector], weights)
    return vector


def _aggregate(
    weighting: Weighting, columns: Columns, losses: Tensor | None
) -> tuple[list[Tensor], Tensor, GramianSource]:
    source = ColumnsSource(columns, losses)
    part = None if stateless[ref(type(weighting))] else stateful_part(weighting)
    undo = None if part is None else restorer(part)
    try:
        weights = weigh(weighting, source)
        if type(columns) is not Columns:
            # Processes that hold the columns together must take the same weights.
            weights = columns.agreed(weights)
        if source.asked:
            wide = columns.few is None and source.rounding_shows(weights)
            if columns.scale == 1.0:  # as `combined` does, which is one more call
                return columns.combine(weights, wide=wide), weights, source
            return *combined(weighting, columns, weights, columns.scale, wide=wide), source
        # Nobody has looked at the rows: whether they are finite shows in their weighted sum.
        vectors = columns.combine(weights)
        if not (is_finite(vectors[0]) if len(vectors) == 1 else all_finite(vectors)):
            vectors, weights = _examine(weighting, columns, source, vectors, weights)
        return vectors, weights, source
    except BaseException:
        if undo is not None:  # memory may end after the weighing
            undo()
        raise


def _examine(
    weighting: Weighting,
    columns: Columns,
    source: GramianSource,
    vectors: list[Tensor],
    weights: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """What weights that do not depend on the rows answer where the vectors are not finite."""
    # Looked for only now: to read all rows at every step would cost as much as to weigh them.
    rows = columns.nonfinite_rows()
    if not rows:
        return vectors, weights  # a finite sum that overflowed in its own dtype
    source.take_back()
    if finite_required(getattr(weighting, "check_finite", None)):
        raise NonFiniteError(rows)
    return [vector * math.nan for vector in vectors], weights * math.nan
