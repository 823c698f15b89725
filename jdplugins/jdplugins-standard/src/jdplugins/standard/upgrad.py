from __future__ import annotations

from functools import lru_cache

import numpy as np
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianWeighting, find_solver, row_weights, solver_field
from jdcore.protocols import DualConeSolver
from jdcore.validators import row_vector

_SHARED = 64  # up to this size, making the references costs more than the memory to keep them


@define(eq=False)
class UPGradWeighting(GramianWeighting):
    """
    Unconflicting projection of gradients: every row projected onto the dual cone, then averaged.

    ``A(J) = Σ_i π_J(p_i g_i)``, where ``π_J(x)`` is the vector closest to x that has a non-negative
    inner product with every row of J, and p is the preference vector. The update conflicts with no
    objective, and rows that are longer count for more, linearly. From `Jacobian Descent for
    Multi-Objective Optimization <https://arxiv.org/pdf/2406.16232>`_.

    The method to start with: it protects every objective, and converges where the mean converges.
    Choose :class:`DualProj <jdcore.aggregation.DualProj>` for many objectives if time matters: it
    projects once instead of m times.

    :param pref_vector: Preferences p, Tensor [m]; 1/m each if None. Objectives with preference zero
        are protected without being sought.
    :param solver: Name or instance of a ``"dual_cone"`` solver.

    >>> import torch
    >>> from jdcore.aggregation import UPGrad
    >>> UPGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.2924, 1.9006, 1.9006])
    """

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    solver: DualConeSolver | str = solver_field("dual_cone")

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        project: DualConeSolver = find_solver("dual_cone", self.solver)
        m = len(gramian)
        if self.pref_vector is None and m <= _SHARED:
            units, factors = _equal_preferences(m)
        else:
            factors = row_weights(self.pref_vector, m)
            units = np.diag(np.where(factors < 0.0, -1.0, 1.0))
            factors = np.abs(factors)
        # Projecting commutes with positive factors. A product is cheaper to call than a reduction.
        weights: NDArray[np.float64] = project(gramian, units).T.dot(factors)
        return weights


@lru_cache(maxsize=16)
def _equal_preferences(m: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    units, factors = np.eye(m), row_weights(None, m)
    units.flags.writeable = factors.flags.writeable = False  # they are shared
    return units, factors
