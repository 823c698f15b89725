from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore._modes import exact_products, without_autocast
from jdcore.aggregation._aggregator import GramianAggregator
from jdcore.aggregation._answers import array_for, describe_answer
from jdcore.aggregation._any import vectors_of
from jdcore.aggregation._columns import Columns, power, power_of_two, widest
from jdcore.aggregation._finite import (
    all_finite,
    finite_required,
    gramian_error,
    is_finite,
    nonfinite_rows,
)
from jdcore.aggregation._informed_aggregator import InformedAggregator
from jdcore.aggregation._nested_state import NestedState, restorer, state_kept
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.aggregation._source import ColumnsSource, GramianSource, numbers_of, taken_by
from jdcore.aggregation._weigh import Result, check_aggregator, watched, weigh, weighting_of
from jdcore.aggregation._wrapping import Delegating
from jdcore.errors import NonFiniteError, ParameterError, left_out
from jdcore.linalg import factors
from jdcore.linalg._combine import sent
from jdcore.linalg._gramian import symmetric
from jdcore.protocols import Aggregator, Weighting


def aggregator_validator(_: Any, attribute: Attribute[Any], value: Any) -> None:
    """Attrs validator: an aggregator, which may be a plain function; no weighting."""
    check_aggregator(value, attribute.name)


@define(eq=False)
class RowMixing(NestedState, InformedAggregator):
    """
    Base class of wrappers that hand combinations of the rows to another aggregator.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`mix`, a matrix M
    [k, m]: the update is that of the wrapped aggregator for ``M J``. If the wrapped method looks at
    the Gramian only, so does the whole, which then has a ``weighting`` and works with autogram;
    ``M J`` is formed for other methods only, block by block. Where M has no rows, the update is
    zero, and the wrapped aggregator is not asked. A field whose validator is
    :func:`jdcore.validators.row_vector` is checked against the rows and the device at each call.

    Its state is that of its own :func:`state_field` fields, and that of the wrapped aggregator, if
    it has one, under the key ``"aggregator"``.

    A wrapped method that looks at the losses is given ``M losses``, whose Jacobian is ``M J``; the
    rows of a second batch are combined by the M of the first.

    :param aggregator: What aggregates the combined rows: any :class:`~jdcore.Aggregator`.
    """

    aggregator: Aggregator = field(validator=aggregator_validator)

    def inner_parts(self) -> dict[str, Any]:
        """The wrapped aggregator."""
        return {"aggregator": self.aggregator}

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        """
        :param source: A Jacobian of m >= 1 rows. :func:`finite_gramian` gives its Gramian, and
            :func:`row_lengths` the norms of its rows.
        :returns: float64 array [k, m].
        :raises ParameterError: If the method is not defined for this number of rows.
        """
        raise left_out(self, "mix")

    @property
    def weighting(self) -> Weighting | None:
        """Weighting of the whole; None if the wrapped aggregator needs the Jacobian itself."""
        wrapped = weighting_of(self.aggregator)
        return None if wrapped is None else MixedWeighting(self, wrapped)

    @property
    def needs_all_columns(self) -> bool:
        """Whether a process must have all columns, as the wrapped aggregator needs them."""
        inner = self.aggregator
        needs = getattr(inner, "needs_all_columns", False)
        return bool(needs) or not hasattr(inner, "aggregate_columns")

    def aggregate_parts(
        self, columns: Columns, losses: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        vectors, weights = self.aggregate_columns(columns, losses=losses)
        if weights is not None:
            weights = sent(weights, columns.device, widest(columns.blocks), copy=True)
        return vectors, weights

    def aggregate_columns(
        self, columns: Columns, /, *, losses: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """
        Aggregate a Jacobian whose columns may lie on several processes.

        :param columns: The Jacobian.
        :param losses: As for a call.
        :returns: The vectors that it puts together, and the weights [m] or None.
        :raises ParameterError: If the columns lie on several processes, and the wrapped aggregator
            cannot do with them.
        """
        # M J has the Gramian M G Mᵀ: the rows need not be combined at all.
        if self.weighting is not None:
            return GramianAggregator(self.weighting).aggregate_columns(columns, losses=losses)
        if not columns.rows:
            return columns.filled(0.0), None
        source = ColumnsSource(columns, losses)
        return watched(self, columns, lambda: self._aggregate(columns, source))

    def _aggregate(self, columns: Columns, source: GramianSource) -> Result:
        check_row_vectors(self, columns.rows, columns)
        # What is wrapped may fail when its rows are mixed already.
        with state_kept(self) as undo:
            try:
                mixing = self._agreed_mixing(columns, source)
            except NonFiniteError:
                if finite_required(self.check_finite):
                    raise
                undo()
                return columns.filled(math.nan), None
            if not len(mixing):
                return columns.filled(0.0), None
            mixed = MixedColumns(columns, mixing, source)
            return self._aggregate_mixed(mixed, _mixed_losses(mixing, source))

    def _agreed_mixing(self, columns: Columns, source: GramianSource) -> NDArray[np.float64]:
        # As weights: drawn at random, it must be the same on all processes.
        mixing = columns.agreed(torch.from_numpy(_mixed_by(self, source))).numpy()
        # What mixes at random has not looked at the rows, and NaN times zero would hide which of
        # them are at fault.
        if not source.asked and not columns.finite():
            raise NonFiniteError(columns.nonfinite_rows())
        if columns.local and not all_finite(columns.second or []):
            raise NonFiniteError(nonfinite_rows(columns.second or []))
        return mixing

    def _aggregate_mixed(self, columns: MixedColumns, losses: Tensor | None) -> Result:
        inner: Any = self.aggregator
        if hasattr(inner, "aggregate_columns"):
            known = taken_by(inner.aggregate_columns, losses=losses)
            vectors, weights = inner.aggregate_columns(columns, **known)
        else:
            wide, weights = vectors_of(
                inner, columns.local_blocks(), losses, columns.local_second()
            )
            pairs = zip(wide, columns.blocks, strict=True)
            vectors = [vector.to(block.dtype) for vector, block in pairs]
        return vectors, None if weights is None else columns.mixed_weights(weights)


@define(eq=False)
class MixedWeighting(Delegating, NestedState):
    """
    Weighting of a :class:`RowMixing` around a method that looks at the Gramian only.

    :param mixing: What combines the rows.
    :param weighting: What weighs the combined rows.
    """

    mixing: RowMixing
    weighting: Weighting

    def inner_parts(self) -> dict[str, Any]:
        """The wrapper, whose state is that of the whole."""
        return {"mixing": self.mixing}

    @property
    def check_finite(self) -> bool | None:
        """That of the wrapper."""
        return self.mixing.check_finite

    @on_numbers
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: The matrix that the wrapped weighting takes, of the rows before they are
            combined, real floating Tensor [m, m].
        :param losses: As for the wrapper.
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the Gramian is not a real floating square matrix, or an argument
            does not fit its size or device.
        :raises NonFiniteError: See ``check_finite`` of the wrapper.
        :raises NonDifferentiableError: When differentiating through the weights.
        """
        return self._weights_of(gramian, losses)

    def weigh(self, source: GramianSource, /) -> Tensor:
        """
        A call for those who know more of the Jacobian than its Gramian tells.

        :param source: The Jacobian. Its Gramian may be empty or non-finite, on any device.
        :returns: The m weights, a float64 Tensor on the CPU.
        """
        m = source.rows
        check_row_vectors(self.mixing, m, source)
        if m == 0:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        undo = restorer(self)
        try:
            weights = self._weigh(source)
        except BaseException as error:
            undo()
            if not isinstance(error, NonFiniteError) or finite_required(self.check_finite):
                raise
            return torch.full((m,), math.nan, dtype=torch.float64, device="cpu")
        if not source.asked:  # then nobody knows yet whether the rows are finite
            source.undo.append(undo)
        elif not is_finite(weights):
            undo()
        return weights

    def _weigh(self, source: GramianSource) -> Tensor:
        mixing = _mixed_by(self.mixing, source)
        if not len(mixing):
            # NaN is not to be taken for nothing.
            finite_gramian(source) if source.compute is not None else _finite_cross(source)
            return torch.zeros(source.rows, dtype=torch.float64, device="cpu")
        # Rows that are mixed to another scale would leave the range of float64 when squared.
        scale = _scale_of(mixing)
        weights = weigh(self.weighting, _mixed_source(mixing / scale, scale, source))
        # Weights of ``M J / s`` are those of ``M J`` but for a power of s, the degree of the
        # method.
        return weights.double().cpu() @ torch.from_numpy(mixing * power(scale, self.scale_degree))


class MixedColumns(Columns):
    """
    Combinations of the rows of a Jacobian, whose columns may lie on several processes.

    :param columns: The Jacobian.
    :param mixing: float64 array M [k, m].
    :param source: The source of the Jacobian, whose Gramian may be there already.
    """

    def __init__(
        self, columns: Columns, mixing: NDArray[np.float64], source: GramianSource
    ) -> None:
        super().__init__(columns.blocks, columns.second)
        self.rows = len(mixing)
        self._columns = columns
        self._mixing = torch.from_numpy(mixing)
        self._power = _scale_of(mixing)
        self._source = _mixed_source(mixing / self._power, self._power, source)

    @property
    def local(self) -> bool:
        return self._columns.local

    def gramian(self) -> Tensor:
        self.products = self._source.gramian()
        self.scale = self._source.scale()
        return self.products

    def cross_gramian(self) -> Tensor:
        gramian = self._source.cross_gramian()
        self.scale = self._source.scale()
        return gramian

    def agreed(self, weights: Tensor) -> Tensor:
        return self._columns.agreed(weights)

    def combine(self, weights: Tensor, *, wide: bool = False) -> list[Tensor]:
        return self._columns.combine(self.mixed_weights(weights), wide=wide)

    def mixed_weights(self, weights: Tensor) -> Tensor:
        """Weights [m] of the rows that make up a combination of the combined rows."""
        return weights.double().cpu() @ self._mixing

    def apply(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return self._columns.apply(lambda block: function(self._mixed(block)).to(block.dtype))

    def inner(self, vectors: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        products, squared = self._columns.inner(vectors, scale)
        return self._mixing.to(products.device) @ products, squared

    def finite(self) -> bool:
        return True  # non-finite rows are refused before they are mixed

    def local_blocks(self) -> list[Tensor]:
        """
        The combined rows, if all columns lie on this process.

        :raises ParameterError: If they do not.
        """
        if not self.local:
            raise ParameterError(
                "aggregator",
                "one that can aggregate columns on several processes (it has aggregate_columns)",
                "one that needs all columns at once",
            )
        columns = self._columns
        blocks = columns.local_blocks() if isinstance(columns, MixedColumns) else columns.blocks
        return [self._mixed(block) for block in blocks]

    def local_second(self) -> list[Tensor] | None:
        """The combined rows of the second batch, if there is one, as :meth:`local_blocks`."""
        columns = self._columns
        blocks = columns.local_second() if isinstance(columns, MixedColumns) else columns.second
        return None if blocks is None else [self._mixed(block) for block in blocks]

    def _mixed(self, block: Tensor) -> Tensor:
        # Not in half precision, which would round the rows before they are aggregated, nor by
        # factors that float32 cannot hold.
        mixing = factors(self._mixing, block.device, wide=block.dtype == torch.float64)
        with without_autocast(block.device.type), exact_products(mixing):
            return mixing @ block.to(mixing.dtype)


def finite_gramian(source: GramianSource) -> NDArray[np.float64]:
    """
    The Gramian of a source as an array.

    :returns: float64 array [m, m]. Must not be modified.
    :raises NonFiniteError: If it holds NaN or infinite values.
    """
    gramian = source.array()
    if not np.isfinite(gramian).all():
        raise gramian_error(gramian)
    return gramian


def _mixed_by(mixing: RowMixing, source: GramianSource) -> NDArray[np.float64]:
    array = array_for("mix", f"[k, {source.rows}]", answer := mixing.mix(source))
    if array.ndim == 2 and array.shape[1] == source.rows:
        return array
    expected = f"a method that returns a real array [k, {source.rows}]"
    raise ParameterError("mix", expected, describe_answer(answer))


def _finite_cross(source: GramianSource) -> NDArray[np.float64]:
    gramian = numbers_of(source.cross_gramian())
    if not np.isfinite(gramian).all():
        raise gramian_error(gramian)
    return gramian


def row_lengths(source: GramianSource) -> NDArray[np.float64]:
    """
    Norms of the rows of a source.

    :returns: float64 array [m].
    :raises NonFiniteError: If the Gramian holds NaN or infinite values.
    """
    lengths: NDArray[np.float64] = np.sqrt(np.diagonal(finite_gramian(source)))
    return lengths * source.scale()


def _mixed_source(
    mixing: NDArray[np.float64], scale: float, source: GramianSource
) -> GramianSource:
    """The source of ``scale * mixing @ J``."""

    def compute() -> Tensor:
        product = mixing @ finite_gramian(source) @ mixing.T
        # The product of three matrices is symmetric up to rounding only.
        return symmetric(torch.from_numpy(product))

    def compute_cross() -> Tensor:
        return torch.from_numpy(mixing @ _finite_cross(source) @ mixing.T)

    return GramianSource(
        *(
            len(mixing),
            source.precision,
            source.device,
            None if source.compute is None else compute,
        ),
        rounded_to=source.rounded_to,
        products=source.products,
        losses=_mixed_losses(scale * mixing, source),
        compute_cross=None if source.compute_cross is None else compute_cross,
        scale=lambda: scale * source.scale(),
    )


def _mixed_losses(mixing: NDArray[np.float64], source: GramianSource) -> Tensor | None:
    if source.losses is None:
        return None
    return torch.from_numpy(mixing).to(source.losses.device) @ source.losses.double()


def _scale_of(array: NDArray[np.float64]) -> float:
    largest = float(np.abs(array).max())
    return power_of_two(largest) if largest else 1.0
