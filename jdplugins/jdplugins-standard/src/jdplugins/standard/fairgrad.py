from __future__ import annotations

import math
from typing import Any

import numpy as np
from attrs import Attribute, define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, GramianWeighting, solution, solver_field
from jdcore.errors import ParameterError
from jdcore.protocols import FairAllocationSolver
from jdcore.validators import real


def _degree(instance: Any, attribute: Attribute[float], value: float) -> None:
    real(0.0)(instance, attribute, value)
    if value and math.isinf(1.0 / value):
        raise ParameterError(attribute.name, "0, or a number that has an inverse", value)


@define(eq=False)
class FairGradWeighting(GramianWeighting):
    """
    Alpha-fair gains: the more an objective has gained, the less a further gain counts.

    The weights w > 0 solve ``G w = w^(-1/alpha)`` entry by entry; the update ``Jᵀ w`` maximises
    ``Σ (g_i · d)^(1 - alpha) / (1 - alpha)`` among those of its length. From `Fair Resource
    Allocation in Multi-Task Learning <https://arxiv.org/pdf/2402.15638>`_.

    ``alpha = 0`` asks for the largest sum (weights 1/m), 1 for proportional fairness, which is
    :class:`NashMTL <jdcore.aggregation.NashMTL>` without its limit of the length, 2 for the least
    potential delay; large ones approach the largest worst gain. The authors find 1 to 2 best.

    The update conflicts with no row. Its length grows with that of the rows to the power of
    ``(1 - alpha) / (1 + alpha)``. At a Pareto-stationary point (a non-negative combination of
    non-zero rows is zero) there is no solution; the rows concerned are then left aside, and the
    others share orthogonally to them. Zero rows get weight zero.

    :param alpha: Degree of fairness, >= 0.
    :param solver: Name or instance of a ``"fair_allocation"`` solver.

    >>> import torch
    >>> from jdcore.aggregation import FairGrad
    >>> FairGrad(alpha=1.0)(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
    tensor([1., 1.])
    """

    alpha: float = field(default=1.0, validator=_degree)
    solver: FairAllocationSolver | str = solver_field("fair_allocation")

    @property
    def scale_degree(self) -> float:  # type: ignore[override]  # depends on an argument here
        """The power d for which the weights of ``s * J`` are ``s**d`` times those of J."""
        return -2.0 * self.alpha / (1.0 + self.alpha)

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        if self.alpha == 0.0:
            return np.full(len(gramian), 1.0 / len(gramian))
        given = source.definite(gramian), self.alpha, source.proximal_level
        return solution("fair_allocation", self.solver, (len(gramian),), *given)
