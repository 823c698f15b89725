from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import Columns, HistoryAggregator, state_field
from jdcore.validators import integer, one_of, real
from jdplugins.standard._decay import decayed
from jdplugins.standard._simplex import (
    descend,
    kept_weights,
    project_onto_simplex,
    softmax,
    weights_state,
)


@define(eq=False)
class MoCo(HistoryAggregator):
    """
    Multi-objective gradient correction: tracked rows, and a step towards their shortest mixture.

    The tracked rows follow the Jacobian, ``Y ← Y - β (Y - J)``, which averages the noise of the
    batches out; the weights take one step, ``λ ← softmax(λ - γ (Y Yᵀ + ρ I) λ)``; the update is
    ``Yᵀ λ``. From `Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
    Approach <https://openreview.net/pdf?id=dLAYGdKTi2>`_.

    Choose it over :class:`MGDA <jdcore.aggregation.MGDA>` where batches are small and memory for
    one more Jacobian is no matter. γ is a rate per squared length of the rows, so the weights
    depend on the scale of the losses.

    The softmax is that of the authors' code; it draws weights towards 1/m at each step. The paper
    itself projects onto the simplex: ``onto="projection"``.

    Stateful: Y [m, n], zero at first, and λ, 1/m each at first.

    :param beta: Rate β of the tracked rows, in [0, 1].
    :param gamma: Step size γ of the weights.
    :param rho: Regularisation ρ towards equal weights.
    :param beta_sigma: Decay: the rate at call k is ``β / k^beta_sigma``.
    :param gamma_sigma: Decay: the step size at call k is ``γ / k^gamma_sigma``.
    :param onto: How weights are brought back to the simplex, ``"softmax"`` or ``"projection"``.
    :raises ParameterError: At a call, if the number of rows is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import MoCo
    >>> aggregator = MoCo(beta=0.5, gamma=0.0)
    >>> aggregator(torch.tensor([[4.0, 0.0], [0.0, 8.0]]))
    tensor([1., 2.])
    """

    beta: float = field(default=0.5, validator=real(0.0, 1.0))
    gamma: float = field(default=0.1, validator=real(0.0))
    rho: float = field(default=0.0, validator=real(0.0))
    beta_sigma: float = field(default=0.0, validator=real(0.0))
    gamma_sigma: float = field(default=0.0, validator=real(0.0))
    onto: Literal["softmax", "projection"] = field(
        default="softmax", validator=one_of("softmax", "projection")
    )
    weights: Tensor = weights_state()
    calls: int = state_field(int, validator=integer(0))

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        del losses
        rate = decayed(self.beta, self.calls, self.beta_sigma)
        return rate * rows if history is None else torch.lerp(history, rows, rate)

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        del rows, losses
        # One copy from an accelerator, which would take longer for steps on m numbers than the CPU.
        gramian, scale = history.gramian().cpu().numpy(), history.scale
        old = kept_weights(self.weights, len(gramian), "matrix")
        old = np.full(len(gramian), 1.0 / len(gramian)) if old is None else old
        gamma = decayed(self.gamma, self.calls, self.gamma_sigma)
        shrunk = (1.0 - gamma * self.rho) * old
        # The Gramian is that of the tracked rows divided by the scale.
        lowered = descend(shrunk, gramian @ old, gamma * scale * scale)
        new = softmax(lowered) if self.onto == "softmax" else project_onto_simplex(lowered)
        weights = torch.from_numpy(new)
        return weights, {"weights": weights, "calls": self.calls + 1}
