from __future__ import annotations

import math

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, GramianWeighting, solution, solver_field
from jdcore.linalg import add_proximal
from jdcore.protocols import MinNormSolver
from jdcore.validators import real
from jdplugins.standard._solvers import Bracket

_ZERO = 1e-7  # relative length of a mean that counts as zero
_ROUNDING = 64.0 * 2.0**-52
_STEPS = 100
_CLOSE = 1e-14


@define(eq=False)
class ConicGradWeighting(GramianWeighting):
    """
    The best worst case in a cone around the mean of the rows, as long as the mean.

    Of all directions d of length 1 that have at least the cosine c with the mean g0, it takes the
    one that maximises ``min_i g_i · d``; the update is ``‖g0‖ d``. From `Fantastic Multi-Task
    Gradient Updates and How to Find Them In a Cone <https://arxiv.org/pdf/2502.00217>`_.

    Choose it over :class:`CAGrad <jdcore.aggregation.CAGrad>`, which looks for the same in a ball
    around the mean, where the angle shall be bounded but not the length. Where no direction of the
    cone improves all objectives, the update is the mean.

    The authors take one gradient step on the weights per call; here, the problem is solved exactly:
    d is the direction of the shortest vector in the convex hull of the rows ``g_i + t g0``, for the
    smallest ``t >= 0`` that brings it into the cone.

    :param c: Least cosine with the mean, in [0, 1).
    :param solver: Name or instance of a ``"min_norm"`` solver.

    >>> import torch
    >>> from jdcore.aggregation import ConicGrad
    >>> ConicGrad(c=0.0)(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    tensor([1., 1.])
    """

    c: float = field(default=0.5, validator=real(0.0, below=1.0))
    solver: MinNormSolver | str = solver_field("min_norm")

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        level = source.proximal_level
        gramian = add_proximal(gramian, level)
        m = len(gramian)
        mean = np.full(m, 1.0 / m)
        length = math.sqrt(max(float(gramian.mean()), 0.0))
        weights = self._improving(gramian, length, level)
        if weights is None:
            return mean
        scaled: NDArray[np.float64] = weights * (length / _length(weights, gramian))
        return scaled

    def _improving(
        self, gramian: NDArray[np.float64], length: float, level: float
    ) -> NDArray[np.float64] | None:
        """The weights of the direction, if there is one that improves all objectives."""
        sizes = np.sqrt(np.diagonal(gramian))
        if not length > _ZERO * sizes.max():
            return None
        weights, excess = self._at(0.0, gramian, length)
        parts = weights * sizes
        # Nothing improves all objectives if their shortest combination is zero, which it is to the
        # precision of the rows if most of it comes from the proximal term.
        if _length(weights, gramian) ** 2 <= 2.0 * level * float(parts @ parts):
            return None
        if excess < 0.0:
            weights = self._search(gramian, length, excess)
        # At a stationary point the products are zero but for that.
        rounding = _ROUNDING * len(weights) * (np.abs(gramian) @ np.abs(weights))
        return weights if bool((gramian @ weights > rounding).all()) else None

    def _at(
        self, t: float, gramian: NDArray[np.float64], length: float
    ) -> tuple[NDArray[np.float64], float]:
        """Weights of the shortest combination of ``g_i + t g0``, and its cosine less c."""
        towards = gramian.mean(axis=1)
        shifted = gramian + t * (towards[:, None] + towards) + t * t * length * length
        shortest = solution("min_norm", self.solver, (len(gramian),), shifted)
        weights = shortest + t / len(gramian)
        norm = _length(weights, gramian) * length
        # What is zero has no cosine; it is left aside later on, as it improves nothing.
        cosine = float(weights @ towards) / norm if norm > 0.0 else 1.0
        return weights, cosine - self.c

    def _search(
        self, gramian: NDArray[np.float64], length: float, excess: float
    ) -> NDArray[np.float64]:
        """The weights for the smallest shift that brings the direction into the cone."""
        # The shift is of the order of the shortest row in the border case, and of one in others.
        low, below, high = 0.0, excess, 0.1 * math.sqrt(gramian.diagonal().min()) / length
        weights, above = self._at(high, gramian, length)
        while above < 0.0:
            low, below, high = high, above, 4.0 * high
            weights, above = self._at(high, gramian, length)
        bracket = Bracket(low, high, below, above)
        for _ in range(_STEPS):
            if above <= _CLOSE:
                break
            t = bracket.interpolate()
            candidate, value = self._at(t, gramian, length)
            if value >= 0.0:
                weights, above = candidate, value
            if value == 0.0 or not bracket.tighten(t, value):
                break
        return weights


def _length(weights: NDArray[np.float64], gramian: NDArray[np.float64]) -> float:
    return math.sqrt(max(float(weights @ gramian @ weights), 0.0))
