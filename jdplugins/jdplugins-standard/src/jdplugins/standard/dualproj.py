from __future__ import annotations

from typing import ClassVar

import numpy as np
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianWeighting, row_weights, solution, solver_field
from jdcore.protocols import DualConeSolver
from jdcore.validators import row_vector


@define(eq=False)
class DualProjWeighting(GramianWeighting):
    """
    Dual projection: the mean of the rows, projected onto the dual cone.

    ``A(J) = π_J(Jᵀ p)``, where ``π_J(x)`` is the vector closest to x that has a non-negative inner
    product with every row of J, and p is the preference vector. From `Gradient Episodic Memory for
    Continual Learning <https://arxiv.org/pdf/1706.08840>`_, which projects the gradient of one
    task.

    It conflicts with no objective and solves one small problem however many there are. Where the
    mean of conflicting gradients is zero, so is the update; :class:`UPGrad
    <jdcore.aggregation.UPGrad>` then still makes progress if any direction does.

    :param pref_vector: Preferences p, Tensor [m]; 1/m each if None.
    :param solver: Name or instance of a ``"dual_cone"`` solver.

    >>> import torch
    >>> from jdcore.aggregation import DualProj
    >>> DualProj()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.5556, 1.1111, 1.1111])
    """

    proximal: ClassVar[bool] = True

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    solver: DualConeSolver | str = solver_field("dual_cone")

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        # One reference among the several that a solver projects at once.
        reference = row_weights(self.pref_vector, len(gramian))[None]
        found = solution("dual_cone", self.solver, reference.shape, gramian, reference)
        weights: NDArray[np.float64] = found[0]
        return weights
