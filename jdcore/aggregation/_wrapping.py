from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, gramian_error, is_finite
from jdcore.aggregation._nested_state import NestedState, restorer
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.aggregation._source import GramianSource, numbers_of
from jdcore.aggregation._weigh import as_weighting, checked, weigh
from jdcore.errors import left_out
from jdcore.linalg._combine import sent
from jdcore.protocols import Weighting
from jdcore.validators import boolean, check_gramian


class Delegating:
    """What a weighting around another one, in its field ``weighting``, takes from that."""

    __slots__ = ()

    @property
    def scale_degree(self) -> float:
        """The power d for which the weights of ``s * J`` are ``s**d`` times those of J."""
        degree: float = getattr(self.weighting, "scale_degree", 0)  # type: ignore[attr-defined]
        return degree

    def source_of(self, matrix: Tensor, losses: Tensor | None) -> GramianSource:
        """What the matrix that a call is given stands for, as for the wrapped weighting."""
        of = getattr(self.weighting, "source_of", GramianSource.of)  # type: ignore[attr-defined]
        source: GramianSource = of(matrix, losses)
        return source

    def _weights_of(self, gramian: Tensor, losses: Tensor | None) -> Tensor:
        check_gramian(gramian)
        source = self.source_of(gramian, losses)
        weights = sent(weigh(self, source), gramian.device, gramian.dtype, copy=True)
        # Weights of methods that do not look at the input are finite for any.
        if source.undo and not is_finite(gramian):
            source.take_back()
            if finite_required(self.check_finite):  # type: ignore[attr-defined]
                raise gramian_error(gramian.detach().double().cpu().numpy())
            weights.fill_(torch.nan)
        return forbid_differentiation(self, gramian, weights)


@define(eq=False)
class WeightingWrapper(Delegating, NestedState):
    """
    Base class of weightings that change what another one does.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`rewrite`: it asks
    ``self.weighting`` by :func:`~jdcore.aggregation.weigh`, with the source that it was given or
    one derived from it. Its state is that of its own :func:`state_field` fields and that of what it
    wraps, under the key ``"weighting"``; so every wrapper is :class:`~jdcore.Stateful`.

    :param weighting: What is wrapped: a :class:`~jdcore.Weighting`, also a plain function or
        another wrapper, or an aggregator made of one.
    :param check_finite: As for :class:`GramianWeighting`; what is wrapped has its own.
    :raises ParameterTypeError: If it is an aggregator that needs the Jacobian itself.
    """

    weighting: Weighting = field(converter=as_weighting)
    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def inner_parts(self) -> dict[str, Any]:
        """What is wrapped."""
        return {"weighting": self.weighting}

    def rewrite(self, source: GramianSource) -> Tensor:
        """
        :param source: The Jacobian, of at least one row.
        :returns: Weights [m], a Tensor on any device. Weights that are not finite are for input
            that is not finite, and must leave the state as it was.
        """
        raise left_out(self, "rewrite")

    @on_numbers
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: The matrix that the wrapped weighting takes, real floating Tensor [m, m].
        :param losses: Values of the objectives, Tensor [m], for methods that look at them.
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the input or an argument does not fit.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the weights.
        """
        return self._weights_of(gramian, losses)

    def weigh(self, source: GramianSource, /) -> Tensor:
        """See :meth:`GramianWeighting.weigh`."""
        check_row_vectors(self, source.rows, source)
        if not source.rows:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        undo = restorer(self)
        weights = checked(self.rewrite(source), (source.rows,))
        if not source.asked:  # then nobody knows yet whether the rows are finite
            source.undo.append(undo)
        if is_finite(weights):
            return weights
        if finite_required(self.check_finite):
            # Products may be computed just for this: the error is to name the rows. Those of two
            # batches show both.
            two = source.compute_cross is not None
            raise gramian_error(numbers_of(source.cross_gramian()) if two else source.array())
        return torch.full_like(weights, torch.nan)
