from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from attrs import Attribute, define
from torch import Tensor

from jdcore._modes import refuse_tangents
from jdcore.aggregation._answers import shape_of
from jdcore.aggregation._columns import Columns, widest
from jdcore.aggregation._coordinatewise import portions
from jdcore.aggregation._finite import finite_required, is_finite, nonfinite_rows
from jdcore.aggregation._informed_aggregator import InformedAggregator
from jdcore.aggregation._nested_state import state_kept
from jdcore.aggregation._source import ColumnsSource, GramianSource, check_losses
from jdcore.aggregation._state import StateFields, state_field
from jdcore.aggregation._weigh import Result, checked, combined, watched
from jdcore.errors import NonFiniteError, ParameterError, left_out
from jdcore.linalg._pages import new_tensor
from jdcore.validators import describe_tensor


def _nothing() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.float64, device="cpu")


def _matrix(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if value.ndim != 2:
        raise ParameterError(attribute.name, "a matrix", describe_tensor(value))


@define(eq=False)
class HistoryAggregator(StateFields, InformedAggregator):
    """
    Base class of aggregators that keep something of the size of the Jacobian from call to call.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`advance` and
    :meth:`weigh_rows`, and need not think of half precision, of empty or non-finite input, nor of
    when state may change: the new history and what :meth:`weigh_rows` returns are kept as the last
    step of a call that succeeded. Jacobians of single parameters are never concatenated; the
    history is one Tensor [m, n], in the wider of float32 and the dtype of the Jacobian.

    All calls between two :meth:`reset` must have Jacobians of the same shape. A second batch has no
    history.
    """

    needs_jacobian: ClassVar[bool] = True
    """That a field ``weighting`` of a subclass is an argument, not the weighting of the whole."""

    combines_history: ClassVar[bool] = True
    """Whether the update is a combination of the rows of the history, or of the Jacobian."""

    scale_degree: ClassVar[float] = 0.0
    """d such that the weights of ``s * J`` are ``s**d`` times those of J."""

    looks_at_losses: ClassVar[bool] = False
    """Whether a call without losses is refused."""

    history: Tensor = state_field(_nothing, validator=_matrix)  # noqa: RUF009 - a field

    @property
    def keeps_history(self) -> bool:
        """Whether the next call needs the history; False for arguments that do without."""
        return True

    def check_values(self, losses: Tensor) -> None:
        """
        Refuse losses for which the method is not defined; once a call, before anything is made.

        :param losses: Finite values of the objectives [m], where the caller gave them.
        :raises ParameterError: Never here; subclasses that need it implement this method.
        """

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        """
        The new history of some columns.

        :param rows: Finite Tensor [m, k] of float32 or float64 with m, k >= 1. Must not be
            modified.
        :param history: The old history of these columns [m, k] in the same dtype; None at the
            first call. Must not be modified.
        :param losses: Finite float64 values of the objectives [m] on the device of the rows, if
            the caller gave them. They are there if the class looks at them.
        :returns: Tensor [m, k] of that dtype.
        """
        raise left_out(self, "advance")

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """
        The weights, and the new values of all other state.

        :param rows: The Jacobian, see :meth:`advance`. It has the second batch, if there is one.
        :param history: The new history, in the same blocks of columns, with the same second batch.
        :param losses: See :meth:`advance`.
        :returns: float64 weights [m] on any device, of rows that were divided by
            ``history.scale``, and values by the names of state fields.
        """
        raise left_out(self, "weigh_rows")

    def aggregate_parts(
        self, columns: Columns, losses: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        m = columns.rows
        known = self._known(losses, m)
        if not m:
            return columns.filled(0.0), columns.blocks[0].new_zeros(0)
        refuse_tangents(columns.blocks, "matrix")  # its state would keep them
        with state_kept(self):  # what is wrapped may have moved on when a later step fails
            return watched(self, columns, lambda: self._vectors(columns, known))

    def _vectors(self, columns: Columns, losses: Tensor | None) -> Result:
        blocks = columns.blocks
        if not self._finite(columns, losses):
            return columns.filled(math.nan), None
        if losses is not None:
            self.check_values(losses)
        dtype = widest(blocks)
        # What a step adds to an average is often less than the last digit of half precision.
        rows = [block.to(torch.promote_types(dtype, torch.float32)) for block in blocks]
        values = None if losses is None else losses.to(rows[0].device, torch.float64)
        # Nothing of the object is written before the last step that may fail is done.
        history = self._advanced(rows, values)
        parts = list(torch.split(history, [block.shape[1] for block in blocks], dim=1))
        jacobian, kept = (Columns(each, columns.second) for each in (rows, parts))
        weights, state = self._weighed(jacobian, kept, values)
        if not is_finite(weights):  # what is wrapped looked at more than the rows
            if finite_required(self.check_finite):
                raise NonFiniteError(nonfinite_rows(columns.second or blocks))
            return columns.filled(math.nan), None
        chosen = kept if self.combines_history else jacobian
        wide = ColumnsSource(chosen).rounding_shows(weights)
        vectors, weights = combined(self, chosen, weights, kept.scale, wide=wide)
        for name, value in state.items():
            setattr(self, name, value)
        self.history = history if self.keeps_history else _nothing()
        # Weights of the history say nothing of the rows of this Jacobian.
        told = None if self.combines_history else weights.to(blocks[0].device, dtype)
        return [vector.to(b) for vector, b in zip(vectors, blocks, strict=True)], told

    def _weighed(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        answer: Any = self.weigh_rows(rows, history, losses)
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
            return checked(answer[0], (history.rows,)), answer[1]
        expected = "a method that returns weights, and a dictionary of state"
        raise ParameterError("weigh_rows", expected, describe_tensor(answer))

    def _advanced(self, rows: list[Tensor], losses: Tensor | None) -> Tensor:
        widths = [block.shape[1] for block in rows]
        old = self._old(len(rows[0]), sum(widths), rows[0])
        # New memory, as the old history must stay if the call fails.
        new = new_tensor(rows[0], len(rows[0]), sum(widths))
        olds = [None] * len(rows) if old is None else list(torch.split(old, widths, dim=1))
        for part, piece, before in zip(torch.split(new, widths, dim=1), rows, olds, strict=True):
            # In portions that stay in the cache: what `advance` makes would go through memory.
            for cut in portions(piece):
                past = None if before is None else before[:, cut]
                fresh = self.advance(piece[:, cut], past, losses)
                if shape_of(fresh) != part[:, cut].shape:  # would be broadcast
                    expected = f"a method that returns a Tensor of shape {list(part[:, cut].shape)}"
                    raise ParameterError("advance", expected, describe_tensor(fresh))
                part[:, cut] = fresh
        return new

    def _known(self, losses: Tensor | None, m: int) -> Tensor | None:
        """
        The losses, if they are given.

        :raises ParameterError: If they are not, but the class looks at them.
        """
        values = check_losses(losses, m)
        if self.looks_at_losses:
            cpu = torch.device("cpu")
            GramianSource(m, torch.float64, cpu, None, losses=values).known_losses()
        return values

    def _finite(self, columns: Columns, losses: Tensor | None) -> bool:
        """Whether rows and losses are finite."""
        broken = [] if losses is None else (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if not broken and columns.finite():
            return True
        if finite_required(self.check_finite):
            rows = broken or columns.nonfinite_rows()
            raise NonFiniteError(rows, "values" if broken else "gradients")
        return False

    def _old(self, m: int, n: int, like: Tensor) -> Tensor | None:
        """The history in dtype and on the device of the rows; None before the first call."""
        if not len(self.history):
            return None
        if self.history.shape != (m, n):
            raise ParameterError(
                "matrix",
                f"of shape {list(self.history.shape)}, as in the calls before",
                f"one of shape {[m, n]}",
                "Call reset() before the number of objectives or parameters changes.",
            )
        return self.history.to(like)
