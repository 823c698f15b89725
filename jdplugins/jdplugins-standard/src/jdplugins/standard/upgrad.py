from __future__ import annotations

from functools import cache, lru_cache
from typing import ClassVar

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianWeighting, find_solver, row_weights, solution, solver_field
from jdcore.errors import ParameterError
from jdcore.linalg import product
from jdcore.protocols import DualConeSolver
from jdcore.validators import describe_tensor, row_vector

_FEW = 64  # rows up to which what is projected is kept, 32 KB at most


@cache
def _shares_of_few(m: int) -> NDArray[np.float64]:
    """What is projected where there are no preferences; a copy is made in less time."""
    return np.diag(row_weights(None, m))


@lru_cache(maxsize=16)
def _ones(m: int) -> NDArray[np.float64]:
    """Factors of a sum of rows, which a few are multiplied by in less time than summed."""
    return np.ones(m)


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

    proximal: ClassVar[bool] = True

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    solver: DualConeSolver | str = solver_field("dual_cone")

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        if self.pref_vector is None and m <= _FEW:
            # A copy, as the solver may be anybody's and write into it.
            references = _shares_of_few(m).copy()
        else:
            references = np.diag(row_weights(self.pref_vector, m))
        found = solution("dual_cone", self.solver, (m, m), gramian, references)
        return _ones(m).dot(found) if m <= _FEW else product(_ones(m), found)

    def compute_there(self, gramian: Tensor) -> Tensor | None:
        project = getattr(find_solver("dual_cone", self.solver), "project", None)
        # Backends that were written for other libraries know arrays alone.
        if project is None:
            return None
        preferences = gramian.new_full((len(gramian),), 1.0 / len(gramian))
        if self.pref_vector is not None:
            preferences = self.pref_vector.to(gramian)
        found = project(gramian, torch.diag(preferences))
        # Told without waiting for the device, as `solution` does on the host.
        if getattr(found, "shape", None) != gramian.shape or found.dtype != gramian.dtype:
            expected = f"one whose `project` answers {describe_tensor(gramian)}"
            raise ParameterError("solver", expected, describe_tensor(found))
        weights: Tensor = found.sum(0)
        return weights
