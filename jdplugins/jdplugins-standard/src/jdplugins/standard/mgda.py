from __future__ import annotations

from typing import ClassVar

import numpy as np
from attrs import define
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting, solution, solver_field
from jdcore.protocols import MinNormSolver


@define(eq=False)
class MGDAWeighting(GramianWeighting):
    """
    Multiple-gradient descent: the shortest vector in the convex hull of the rows.

    ``A(J) = argmin ‖x‖`` over ``x = Jᵀ w`` with ``w >= 0`` and ``sum(w) = 1``. It decreases all
    objectives at the same rate (those with a positive weight), and is zero exactly at
    Pareto-stationary points. From `Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization <https://www.sciencedirect.com/science/article/pii/S1631073X12000738>`_.

    The shortest row dominates: choose it where gradients of comparable norm conflict, and
    :class:`UPGrad <jdcore.aggregation.UPGrad>` where long gradients should count for more.

    :param solver: Name or instance of a ``"min_norm"`` solver. ``"native"`` finds the exact point;
        ``"frank_wolfe"`` is the procedure of `Multi-Task Learning as Multi-Objective Optimization
        <https://arxiv.org/pdf/1810.04650>`_, which is an approximation; give
        ``jdcore.get_solver("min_norm", "frank_wolfe", epsilon=..., max_iters=...)`` to set when it
        stops.

    >>> import torch
    >>> from jdcore.aggregation import MGDA
    >>> MGDA()(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    tensor([1.9200, 1.4400])
    """

    proximal: ClassVar[bool] = True

    solver: MinNormSolver | str = solver_field("min_norm")

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return solution("min_norm", self.solver, (len(gramian),), gramian)
