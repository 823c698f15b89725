from __future__ import annotations

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import CrossGramianWeighting, GramianSource, StateFields
from jdcore.validators import real
from jdplugins.standard._simplex import descend, kept_weights, project_onto_simplex, weights_state


@define(eq=False)
class MoDoWeighting(StateFields, CrossGramianWeighting):
    """
    Multi-objective gradient with double sampling: one step towards the shortest combination.

    ``λ ← Π(λ - γ (J₁ J₂ᵀ + ρ I) λ)``, where Π projects onto the simplex and the Jacobians are those
    of two independent batches, so that the step is an unbiased estimate of one on the expected
    losses. From `Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance <https://www.jmlr.org/papers/volume25/23-1287/23-1287.pdf>`_.

    Choose it over :class:`MGDA <jdcore.aggregation.MGDA>` where batches are small: the shortest
    combination of noisy rows is biased, an average over steps is not. The update of the authors
    uses a third batch: ``weights = weighting(cross_gramian)``, then ``losses.backward(weights)``.

    γ is a rate per squared length of the rows, so the weights depend on the scale of the losses.

    Stateful: the weights are kept, 1/m each at first.

    :param gamma: Step size γ.
    :param rho: Regularisation ρ towards equal weights.
    :raises ParameterError: At a call, without a second batch, or if the number of rows is not
        that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import MoDo
    >>> aggregator = MoDo(gamma=0.4, rho=0.0)
    >>> aggregator(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), second=torch.eye(2))
    tensor([0.8000, 0.6000])
    >>> aggregator.weighting.weights
    tensor([0.4000, 0.6000], dtype=torch.float64)
    """

    gamma: float = field(default=0.1, validator=real(0.0))
    rho: float = field(default=0.1, validator=real(0.0))
    weights: Tensor = weights_state()

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        m, scale = len(gramian), source.scale()
        old = kept_weights(self.weights, m)
        old = np.full(m, 1.0 / m) if old is None else old
        shrunk = (1.0 - self.gamma * self.rho) * old
        # The matrix is that of rows divided by the scale.
        new = project_onto_simplex(descend(shrunk, gramian @ old, self.gamma * scale * scale))
        self.weights = torch.from_numpy(new)
        # A copy: the state shares the memory of the other.
        return np.array(new)
