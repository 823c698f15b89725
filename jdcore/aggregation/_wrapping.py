from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, refuse_gramian
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.aggregation._source import GramianSource, as_weighting, weigh
from jdcore.aggregation._state import StateFields
from jdcore.errors import ParameterError
from jdcore.protocols import Stateful, Weighting
from jdcore.validators import boolean, check_gramian

_INNER = "weighting"


@define(eq=False)
class WeightingWrapper(StateFields):
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

    def rewrite(self, source: GramianSource) -> Tensor:
        """
        :param source: The Jacobian, of at least one row.
        :returns: Weights [m], a Tensor on any device. Weights that are not finite are for input
            that is not finite, and must leave the state as it was.
        """
        raise NotImplementedError

    @property
    def scale_degree(self) -> float:
        """D such that the weights of ``s * J`` are ``s**d`` times those of J."""
        degree: float = getattr(self.weighting, "scale_degree", 0)
        return degree

    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: The matrix that the wrapped weighting takes, real floating Tensor [m, m].
        :param losses: Values of the objectives, Tensor [m], for methods that look at them.
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the input or an argument does not fit.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the weights.
        """
        check_gramian(gramian)
        weights = weigh(self, self.source_of(gramian, losses)).to(gramian, copy=True)
        return forbid_differentiation(self, gramian, weights)

    def source_of(self, matrix: Tensor, losses: Tensor | None) -> GramianSource:
        """What the matrix that a call is given stands for, as for the wrapped weighting."""
        of = getattr(self.weighting, "source_of", GramianSource.of)
        source: GramianSource = of(matrix, losses)
        return source

    def weigh(self, source: GramianSource, /) -> Tensor:
        """See :meth:`GramianWeighting.weigh`."""
        check_row_vectors(self, source.rows, source.device)
        if not source.rows:
            return torch.empty(0, dtype=torch.float64)
        weights = self.rewrite(source)
        if bool(torch.isfinite(weights).all()):
            return weights
        if finite_required(self.check_finite):
            raise refuse_gramian(source.peek().cpu().numpy())
        return torch.full_like(weights, torch.nan)

    def reset(self) -> None:
        """Return to the state of a new object, what is wrapped included."""
        inner = stateful_part(self.weighting)
        if inner is not None:
            inner.reset()
        super().reset()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state: that of what is wrapped is under ``"weighting"``."""
        inner = stateful_part(self.weighting)
        return super().state_dict() | ({} if inner is None else {_INNER: inner.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, of an object with the same arguments.
        :raises ParameterError: If keys are missing or unknown, or a value does not fit its field;
            the state is then left as it was.
        """
        own, inner = split_state(state, stateful_part(self.weighting), _INNER)
        before = super().state_dict()
        super().load_state_dict(own)
        try:
            inner()
        except Exception:
            super().load_state_dict(before)
            raise


def stateful_part(method: Any) -> Stateful | None:
    """The outermost part of a method that has state: adapters delegate to what they hold."""
    while method is not None:
        method = getattr(method, "wrapped", method)
        if isinstance(method, Stateful):
            return method
        method = getattr(method, "weighting", None)
    return None


def split_state(state: Mapping[str, Any], inner: Stateful | None, key: str) -> Any:
    """
    A state without that of an inner part, and a function that restores the latter.

    :raises ParameterError: If the state of the inner part is missing.
    """
    if inner is None or not isinstance(state, Mapping):
        return state, lambda: None
    if key not in state:
        raise ParameterError("state", f"a mapping with the key {key!r}", f"keys {sorted(state)}")
    own = {name: value for name, value in state.items() if name != key}
    return own, lambda: inner.load_state_dict(state[key])
