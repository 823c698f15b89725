from __future__ import annotations

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import CrossGramianWeighting, StateFields, row_weights
from jdcore.validators import integer, real, row_vector
from jdplugins.standard._simplex import descend, kept_weights, project_onto_simplex, weights_state


@define(eq=False)
class SDMGradWeighting(StateFields, CrossGramianWeighting):
    """
    Stochastic direction-oriented descent: few steps towards a short update near a preferred one.

    The update is ``Jᵀ (w + λ w̃) / (1 + λ)``, where w minimises ``‖Jᵀ (w + λ w̃)‖`` over the simplex
    and ``Jᵀ w̃`` is the preferred direction. Each call takes ``n_iter`` steps of projected gradient
    descent with momentum on ``A = J₁ J₂ᵀ``, of two independent batches, from where the last call
    ended. From `Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms <https://arxiv.org/pdf/2305.18409>`_.

    Choose it as :class:`MoDo <jdcore.aggregation.MoDo>`, where an average of the objectives should
    not be lost sight of. As in the authors' experiments, A is divided by the squared mean of the
    square roots of its diagonal first, so the weights do not depend on the scale of the losses;
    where no diagonal entry is positive, they stay as they are.

    Stateful: w is kept, 1/m each at first.

    :param lr: Step size of the inner descent.
    :param momentum: Its momentum, in [0, 1).
    :param n_iter: Number of its steps.
    :param lambda_: Weight λ of the preferred direction.
    :param pref_vector: Preferences w̃, Tensor [m]; 1/m each if None.
    :raises ParameterError: At a call, without a second batch, or if the number of rows is not
        that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import SDMGrad
    >>> aggregator = SDMGrad(lambda_=0.0)
    >>> matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> aggregator(matrix, second=matrix)
    tensor([0.5000, 0.5000])
    """

    lr: float = field(default=10.0, validator=real(0.0))
    momentum: float = field(default=0.5, validator=real(0.0, below=1.0))
    n_iter: int = field(default=20, validator=integer(1))
    lambda_: float = field(default=0.3, validator=real(0.0))
    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    weights: Tensor = weights_state()

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        old = kept_weights(self.weights, m)
        weights = np.full(m, 1.0 / m) if old is None else old
        towards = self.lambda_ * row_weights(self.pref_vector, m)
        # Of two batches, the squared lengths of rows are estimates, which may be negative.
        size = np.sqrt(np.maximum(np.diagonal(gramian), 0.0)).mean()
        if size > 0.0:
            # One division after the other, as the square of the size may leave the range.
            weights = self._descend(gramian / size / size, weights, towards)
        self.weights = torch.from_numpy(weights)
        return (weights + towards) / (1.0 + self.lambda_)

    def _descend(
        self,
        matrix: NDArray[np.float64],
        weights: NDArray[np.float64],
        towards: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        velocity = np.zeros_like(weights)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + matrix @ (weights + towards)
            weights = project_onto_simplex(descend(weights, velocity, self.lr))
        return weights
