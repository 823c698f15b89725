from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import define, field
from torch import Tensor

from jdcore._modes import without_graph
from jdcore.aggregation._answers import checked_vectors
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.errors import ParameterError, left_out
from jdcore.validators import boolean, check_blocks, check_matrix, check_second, describe_tensor


@define(eq=False)
class InformedAggregator:
    """
    Base class of aggregators that may be given the losses, and the Jacobian of a second batch.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`aggregate_parts`.

    :param check_finite: Whether NaN or infinite input raises
        :class:`~jdcore.errors.NonFiniteError` instead of giving a vector of NaN. None means: as the
        environment variable ``JDCORE_CHECK_FINITE`` says (``1`` raises), else no.
    """

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def aggregate_parts(
        self, columns: Columns, losses: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """
        Aggregate a Jacobian that is all in this process.

        :param columns: The Jacobian, with the second batch, if there is one; without graphs.
        :param losses: As for a call.
        :returns: As :meth:`aggregate_blocks`.
        """
        raise left_out(self, "aggregate_parts")

    @on_numbers
    def __call__(
        self, matrix: Tensor, /, *, losses: Tensor | None = None, second: Tensor | None = None
    ) -> Tensor:
        """
        :param matrix: Jacobian, real floating Tensor [m, n].
        :param losses: Values of the objectives, Tensor [m], for methods that look at them.
        :param second: Jacobian of a second, independent batch, Tensor [m, n], for methods that look
            at the cross-Gramian.
        :returns: Update [n], same dtype and device.
        :raises ParameterError: If the matrix is not a real floating matrix, an argument does not
            fit it, or losses are missing.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the aggregation.
        """
        check_matrix(matrix)
        others = None if second is None else check_second([second], [matrix])
        [vector], _ = self._parts(Columns([without_graph(matrix)], others), losses)
        return forbid_differentiation(self, matrix, vector)

    @on_numbers
    def aggregate_blocks(
        self,
        blocks: Sequence[Tensor],
        /,
        *,
        losses: Tensor | None = None,
        second: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """
        Aggregate the Jacobian given as column blocks, without putting them together.

        :param blocks: At least one matrix [m, n1], [m, n2], ...; their dtypes may differ.
        :param losses: As for a call.
        :param second: As for a call, as column blocks of the same shapes.
        :returns: Vectors [n1], [n2], ... in the dtypes of the blocks, and the weights [m] in the
            promoted dtype; None if the update is no combination of the rows of the Jacobian.
        :raises ParameterError: If a block is no real floating matrix or the numbers of rows differ.
        """
        check_blocks(blocks)
        columns = Columns(list(map(without_graph, blocks)), check_second(second, blocks))
        return self._parts(columns, losses)

    def _parts(self, columns: Columns, losses: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        answer: Any = self.aggregate_parts(columns, losses)
        if isinstance(answer, tuple) and len(answer) == 2:
            return checked_vectors(answer[0], columns.blocks), answer[1]
        expected = "a method that returns a list of vectors, and weights or None"
        raise ParameterError("aggregate_parts", expected, describe_tensor(answer))
