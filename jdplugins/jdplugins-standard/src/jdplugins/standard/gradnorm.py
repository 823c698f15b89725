from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import LossWeighting, StateFields, state_field
from jdcore.errors import ParameterError
from jdcore.validators import real
from jdplugins.standard._simplex import kept_weights, no_weights, weights_state

_LARGEST = 300.0  # logarithm of a power of rates


def _rate(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None:
        real(0.0)(instance, attribute, value)


def _positive(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if value.numpy(force=True).min(initial=1.0) <= 0.0:
        raise ParameterError(attribute.name, "positive", value.tolist())


@define(eq=False)
class GradNormWeighting(StateFields, LossWeighting):
    """
    Gradient normalisation: weights under which slower objectives have the longer gradients.

    With the rate ``r_i`` of objective i, its loss relative to its first one, divided by the mean of
    all of these, the weights follow the minimum of ``Σ |w_i ‖g_i‖ - n̄ r_i^α|``, where n̄ is the
    mean of the ``w_i ‖g_i‖``, and are scaled to the sum m. From `GradNorm: Gradient Normalization
    for Adaptive Loss Balancing in Deep Multitask Networks <https://arxiv.org/pdf/1711.02257>`_.

    Choose it where all objectives shall train at similar rates. Only the norms of the rows are
    needed, but for all parameters that are aggregated; the paper takes those of the last shared
    layer. Losses have to be positive.

    Each call takes one step of the proximal gradient method: the weight moves by
    ``lr ‖g_i‖ / n̄`` towards the minimum and stops there, so weights stay positive for any ``lr``,
    and do not depend on the scale of the losses.

    Stateful: the weights, 1 each at first, and the first losses.

    :param alpha: Strength α of the pull back to a common rate, >= 0.
    :param lr: Step size of the weights. None goes to the minimum at once:
        ``w_i`` proportional to ``r_i^α / ‖g_i‖``.
    :raises ParameterError: At a call, if losses are missing or not positive, or their number has
        changed since the first call.

    >>> import torch
    >>> from jdcore.aggregation import GradNorm
    >>> aggregator = GradNorm(lr=None)
    >>> aggregator(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), losses=torch.tensor([2.0, 1.0]))
    tensor([1.6000, 1.6000])
    """

    alpha: float = field(default=1.5, validator=real(0.0))
    lr: float | None = field(default=0.025, validator=_rate)
    weights: Tensor = weights_state()
    first_losses: Tensor = state_field(no_weights, validator=_positive)

    def compute_with(
        self, gramian: NDArray[np.float64], losses: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if not (losses > 0.0).all():
            raise ParameterError("losses", "positive: their ratios are rates", losses.tolist())
        m = len(gramian)
        old = kept_weights(self.weights, m)
        old = np.ones(m) if old is None else old
        first = kept_weights(self.first_losses, m)
        first = losses if first is None else first
        # Logarithms of ratios, which may leave the range as those relative to their mean do not.
        ratios = np.log(losses) - np.log(first)
        ratios -= np.logaddexp.reduce(ratios) - np.log(m)
        norms = np.sqrt(np.diagonal(gramian))
        new = self._moved(old, norms, self._rates(ratios))
        # As the paper does after each step, so that the sum of the weights is no learning rate in
        # disguise.
        new *= m / new.sum()
        self.weights, self.first_losses = torch.from_numpy(new), torch.from_numpy(first.copy())
        return np.array(new)

    def _rates(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        """The powers ``r^α`` of ratios given by their logarithms, in the range of float64."""
        exponents = self.alpha * ratios
        if self.lr is None:  # a common factor makes no difference then
            exponents -= max(0.0, float(exponents.max()) - _LARGEST)
        # Steps of a limited length end long before.
        return np.exp(np.minimum(exponents, _LARGEST))

    def _moved(
        self, weights: NDArray[np.float64], norms: NDArray[np.float64], rates: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        mean = float((weights * norms).mean())
        if not mean > 0.0:
            return weights
        relative = norms / mean
        # Zero rows have any weight they like: they keep theirs.
        wanted: NDArray[np.float64] = weights.copy()
        np.divide(rates, relative, out=wanted, where=relative > 0.0)
        if self.lr is None:
            return wanted
        limit = self.lr * relative
        moved: NDArray[np.float64] = weights + np.clip(wanted - weights, -limit, limit)
        return moved
