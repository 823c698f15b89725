from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, GramianWeighting, solution, solver_field
from jdcore.linalg import add_proximal
from jdcore.protocols import ConflictAverseSolver
from jdcore.validators import real


@define(eq=False)
class CAGradWeighting(GramianWeighting):
    """
    Conflict-averse gradient: the best worst-case improvement in a ball around the mean.

    ``A(J) = argmax_d min_i g_i · d`` subject to ``‖d - g0‖ <= c ‖g0‖``, with g0 the mean of the
    rows. From `Conflict-Averse Gradient Descent for Multi-task Learning
    <https://arxiv.org/pdf/2110.14048>`_.

    With c = 0 it is the mean; with c < 1 it converges to a stationary point of the mean loss; as c
    grows, its direction approaches that of :class:`MGDA <jdcore.aggregation.MGDA>`. At a
    Pareto-stationary point, where no vector improves all objectives, the update is the vector in
    the ball closest to g0 that conflicts with none, if there is one.

    :param c: Radius of the ball relative to ``‖g0‖``, >= 0. The paper uses 0.2 to 0.8.
    :param solver: Name or instance of a ``"conflict_averse"`` solver.

    >>> import torch
    >>> from jdcore.aggregation import CAGrad
    >>> CAGrad(c=0.5)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.1835, 1.2041, 1.2041])
    """

    c: float = field(validator=real(0.0))
    solver: ConflictAverseSolver | str = solver_field("conflict_averse")

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        # The solver is told the level, too: what is no longer than it explains counts as zero.
        level = source.proximal_level
        given = add_proximal(gramian, level), self.c, level
        return solution("conflict_averse", self.solver, (len(gramian),), *given)
