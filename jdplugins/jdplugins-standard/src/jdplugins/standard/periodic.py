from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import GramianSource, WeightingWrapper, state_field, weigh
from jdcore.validators import integer
from jdplugins.standard._simplex import are_keepable, kept_weights, no_weights


@define(eq=False)
class PeriodicWeighting(WeightingWrapper):
    """
    Weights of another method, computed at every k-th call and reused in between.

    Choose it where computing the weights costs more than the rest of a step and they change slowly,
    as `Multi-Task Learning as a Bargaining Game <https://arxiv.org/pdf/2202.01017>`_ finds: nearly
    the same results with new weights every few steps only. Calls in between ask for no Gramian, so
    :func:`gramian_backward <jdcore.autojac.gramian_backward>` and :meth:`Engine.backward
    <jdcore.autogram.Engine.backward>` cost about an ordinary backward pass then.

    Stateful: the weights, the number of calls, and the state of the wrapped method.

    :param weighting: The wrapped :class:`~jdcore.Weighting`, or an aggregator made of one.
    :param every: k, the number of calls that share their weights.
    :raises ParameterError: At a call, if the number of rows is not that of the weights to reuse.

    >>> import torch
    >>> from jdcore.aggregation import MGDAWeighting, Periodic
    >>> aggregator = Periodic(MGDAWeighting(), every=2)
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([0.8000, 0.4000])
    >>> aggregator(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    tensor([4., 1.])
    """

    every: int = field(default=1, validator=integer(1))
    calls: int = state_field(int, validator=integer(0))
    reused: Tensor = state_field(no_weights)

    def rewrite(self, source: GramianSource) -> Tensor:
        known = kept_weights(self.reused, source.rows) if self.calls % self.every else None
        if known is None:
            weights = weigh(self.weighting, source).double().cpu()
            kept = weights * source.unit(self.scale_degree)
            # Neither kept nor counted, if they are no numbers or beyond the range of the rows: the
            # next call asks again.
            lost = (kept == 0.0) & (weights != 0.0)
            if bool(lost.any()) or not are_keepable(kept, source.precision):
                return weights
            self.reused = kept
        else:
            # Those of rows that were not divided by what these are.
            weights = torch.from_numpy(known) / source.unit(self.scale_degree)
        self.calls += 1
        return weights
