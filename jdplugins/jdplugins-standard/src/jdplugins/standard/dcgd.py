from __future__ import annotations

import math
from typing import Literal

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, GramianWeighting
from jdcore.validators import integer, one_of

_ROUNDED = 4.0  # times the proximal level: squared lengths that come from rounding


@define(eq=False)
class DCGDWeighting(GramianWeighting):
    """
    Dual cone gradient descent: the sum of two groups of rows, brought into their dual cone.

    For physics-informed networks: the first rows are gradients of residuals of the equation, the
    others of boundary and initial conditions. With r and b the sums of the two groups and
    ``t = r + b``, the update conflicts with neither r nor b:

    * ``"center"``: the projection of t onto the line between them, which is
      ``(‖r‖ + ‖b‖) / 2 · (r / ‖r‖ + b / ‖b‖)``;
    * ``"projection"``: t if it conflicts with neither; else its part orthogonal to the one that it
      conflicts with;
    * ``"average"``: t if it conflicts with neither; else the mean of its parts orthogonal to r and
      to b.

    From `Dual Cone Gradient Descent for Training Physics-Informed Neural Networks
    <https://arxiv.org/pdf/2409.18426>`_, which recommends the first.

    Choose it where two kinds of losses conflict; :class:`UPGrad <jdcore.aggregation.UPGrad>`
    protects every single row. If a group is missing or its sum is zero, the update is t.

    :param variant: ``"center"``, ``"projection"`` or ``"average"``.
    :param n_residuals: Number of rows in the first group.

    >>> import torch
    >>> from jdcore.aggregation import DCGD
    >>> DCGD()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([2., 2.])
    """

    variant: Literal["center", "projection", "average"] = field(
        default="center", validator=one_of("center", "projection", "average")
    )
    n_residuals: int = field(default=1, validator=integer(1))

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        m = len(gramian)
        first = np.arange(m) < self.n_residuals
        # The rows enter as two sums, of which three products are all that the method needs.
        groups = np.stack([first, ~first]).astype(np.float64)
        (rr, rb), (_, bb) = (groups @ gramian @ groups.T).tolist()
        # Sums that rounding of their rows explains have no direction, and without two directions
        # there is no cone: the update is t.
        least_r, least_b = (
            _ROUNDED * source.proximal_level * (groups @ np.diagonal(gramian))
        ).tolist()
        if not (rr > least_r and bb > least_b):
            return np.ones(m)
        of_first, of_second = self._weights(rr, rb, bb)
        return np.where(first, of_first, of_second)

    def _weights(self, rr: float, rb: float, bb: float) -> tuple[float, float]:
        """Weights of r and b, of which the inner products are given."""
        if self.variant == "center":
            r, b = math.sqrt(rr), math.sqrt(bb)
            return 0.5 * (1.0 + b / r), 0.5 * (1.0 + r / b)
        against_r, against_b = rr + rb < 0.0, bb + rb < 0.0
        if not (against_r or against_b):
            return 1.0, 1.0
        if self.variant == "average":
            return 0.5 * (1.0 - rb / rr), 0.5 * (1.0 - rb / bb)
        return (-rb / rr, 1.0) if against_r else (1.0, -rb / bb)
