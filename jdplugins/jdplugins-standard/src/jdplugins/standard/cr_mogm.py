from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import GramianSource, WeightingWrapper, state_field, weigh
from jdcore.validators import real, row_vector
from jdplugins.standard._simplex import are_keepable, kept_weights, no_weights


@define(eq=False)
class CRMOGMWeighting(WeightingWrapper):
    """
    Momentum on the weights of another method: ``λ ← α λ + (1 - α) λ̂``.

    λ̂ are the weights of the wrapped method. From `On the Convergence of Stochastic Multi-Objective
    Gradient Manipulation and Beyond
    <https://proceedings.neurips.cc/paper_files/paper/2022/file/f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf>`_,
    whose analysis wants α close to 1 as the learning rate falls; set ``.weighting.alpha`` to follow
    a schedule.

    Choose it where batches are small and the weights of a method jump with their noise, which
    biases the update. What the wrapped method guarantees of single updates, such as not to
    conflict, holds on average only.

    Stateful: λ, and the state of the wrapped method.

    :param weighting: The wrapped :class:`~jdcore.Weighting`, or an aggregator made of one.
    :param alpha: Weight α of the past, in [0, 1].
    :param initial_weights: λ before the first call, Tensor [m]. If None, the first weights are
        those of the wrapped method.
    :raises ParameterError: At a call, if the number of rows is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import CRMOGM, MGDAWeighting
    >>> aggregator = CRMOGM(MGDAWeighting(), alpha=0.5, initial_weights=torch.tensor([1.0, 0.0]))
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.7500, 0.2500])
    """

    alpha: float = field(default=0.9, validator=real(0.0, 1.0))
    initial_weights: Tensor | None = field(default=None, validator=row_vector)
    smoothed: Tensor = state_field(no_weights)

    def rewrite(self, source: GramianSource) -> Tensor:
        known = kept_weights(self.smoothed, source.rows)
        fresh = weigh(self.weighting, source).double().cpu()
        # The past is that of rows that were not divided by what these are.
        unit = source.unit(self.scale_degree)
        if known is not None:
            past = torch.from_numpy(known) / unit
        elif self.initial_weights is not None:
            past = self.initial_weights.detach().double().cpu() / unit
        else:
            past = fresh
        weights: Tensor = self.alpha * past + (1.0 - self.alpha) * fresh
        smoothed = weights * unit
        # What is not finite would stay in the average for ever, and what is huge nearly as long.
        if are_keepable(smoothed, source.precision):
            self.smoothed = smoothed
        return weights
