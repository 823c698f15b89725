from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from attrs import define, field
from torch import Tensor

from jdcore._modes import without_graph
from jdcore.aggregation._answers import checked_vectors
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.aggregation._weigh import watched
from jdcore.errors import NonFiniteError, left_out
from jdcore.validators import boolean, check_blocks, check_matrix


@define(eq=False)
class MatrixAggregator:
    """
    Base class of aggregators whose update is no weighted sum of the rows.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`aggregate_finite`
    and need not think of empty or non-finite input, nor of differentiation. A field whose validator
    is :func:`jdcore.validators.row_vector` is checked against the rows and the device at each call.

    :param check_finite: Whether NaN or infinite input raises
        :class:`~jdcore.errors.NonFiniteError` instead of giving a vector of NaN. None means: as the
        environment variable ``JDCORE_CHECK_FINITE`` says (``1`` raises), else no.
    """

    needs_jacobian: ClassVar[bool] = True
    """That a field ``weighting`` of a subclass is an argument, not the weighting of the whole."""

    needs_all_columns: ClassVar[bool] = False
    """
    Whether a process must have all columns, where they could lie on several of them: to draw random
    numbers in their order, or for a state of the size of a row.
    """

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def check_rows(self, m: int) -> None:
        """
        Refuse a number of rows for which the method is not defined.

        :param m: Number of rows, at least 1.
        :raises ParameterError: Never here; subclasses that need it implement this method.
        """

    def aggregate_finite(self, columns: Columns) -> list[Tensor]:
        """
        :param columns: The Jacobian, finite and of at least one row.
        :returns: One vector [k] for each block [m, k], in its dtype.
        """
        raise left_out(self, "aggregate_finite")

    @on_numbers
    def __call__(self, matrix: Tensor, /) -> Tensor:
        """
        :param matrix: Jacobian, real floating Tensor [m, n].
        :returns: Update [n], same dtype and device.
        :raises ParameterError: If the matrix is not a real floating matrix, or an argument of this
            aggregator does not fit it.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the aggregation.
        """
        check_matrix(matrix)
        [vector], _ = self.aggregate_columns(Columns([without_graph(matrix)]))
        return forbid_differentiation(self, matrix, vector)

    @on_numbers
    def aggregate_blocks(self, blocks: Sequence[Tensor], /) -> tuple[list[Tensor], None]:
        """
        Aggregate the Jacobian given as column blocks, without putting them together.

        :param blocks: At least one matrix [m, n1], [m, n2], ...; their dtypes may differ.
        :returns: Vectors [n1], [n2], ... in the dtypes of the blocks; and None, because the update
            is not a weighted sum of the rows.
        :raises ParameterError: If a block is no real floating matrix or the numbers of rows differ.
        """
        check_blocks(blocks)
        return self.aggregate_columns(Columns(list(map(without_graph, blocks))))

    def aggregate_columns(self, columns: Columns, /) -> tuple[list[Tensor], None]:
        """
        Aggregate a Jacobian whose columns may lie on several processes.

        :param columns: The Jacobian.
        :returns: The vectors that it puts together, and None.
        """
        m = columns.rows
        check_row_vectors(self, m, columns)
        if m == 0:
            return columns.filled(0.0), None
        self.check_rows(m)
        vectors, _ = watched(self, columns, lambda: (self._vectors(columns), None))
        return vectors, None

    def _vectors(self, columns: Columns) -> list[Tensor]:
        if columns.finite():
            vectors = self.aggregate_finite(columns)
            return checked_vectors(vectors, columns.blocks) if columns.local else vectors
        if finite_required(self.check_finite):
            raise NonFiniteError(columns.nonfinite_rows())
        return columns.filled(math.nan)
