from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.scalarization import LossScalarizer
from jdcore.validators import real, row_vector
from jdplugins.standard.scalarization._references import direction, preferred, unit_of


@define(eq=False)
class COSMOS(LossScalarizer):
    """
    Weighted sum with a reward for losses in the direction of the preferences.

    With preferences r it is ``r · L - λ cos(r, L)``. From `Scalable Pareto Front Approximation for
    Deep Multi-Objective Learning <https://arxiv.org/pdf/2103.13392>`_, where the model is given r
    too and r is drawn anew for each batch: set ``pref_vector`` before each step.

    :param lambda_: Weight λ of the cosine.
    :param pref_vector: Preferences r, Tensor [m], not zero. None stands for 1/m each.

    >>> import torch
    >>> from jdcore.scalarization import COSMOS
    >>> COSMOS(lambda_=2.0, pref_vector=torch.tensor([0.5, 0.5]))(torch.tensor([3.0, 3.0]))
    tensor(1...)
    """

    lambda_: float = field(default=1.0, validator=real(0.0))
    pref_vector: Tensor | None = field(default=None, validator=row_vector)

    def scalarize(self, losses: Tensor) -> Tensor:
        preferences = preferred(losses, self.pref_vector)
        # Of a multiple, whose gradient stays in range until the last division.
        multiple = losses / unit_of(losses)
        size = torch.linalg.vector_norm(multiple)
        # All losses being zero have no direction, and nothing to gain from one.
        cosine = direction(preferences) @ (multiple / torch.where(size == 0.0, 1.0, size))
        return preferences @ losses - self.lambda_ * cosine
