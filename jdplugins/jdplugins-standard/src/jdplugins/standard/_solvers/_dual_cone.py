from __future__ import annotations

import numpy as np
from attrs import frozen

from jdcore.linalg import equilibrate, product
from jdplugins.standard._solvers._accuracy import ROUGH, Floats, warn_if_unsolved
from jdplugins.standard._solvers._cone_of_few import project_few
from jdplugins.standard._solvers._dispatch import rescue, solve_all
from jdplugins.standard._solvers._semidefinite import nearest_semidefinite

_FEW = 8  # rows, up to which a call of numpy takes longer than the arithmetic


@frozen
class NativeDualConeSolver:
    """
    Exact projection onto the dual cone; the native solver of ``problem="dual_cone"``.

    With D the diagonal matrix of the row norms, ``C = D⁻¹ G D⁻¹`` and ``v = u + D⁻¹ z``, the
    problem is the LCP ``z >= 0``, ``C z + C D u >= 0``, both complementary: the scales of the rows
    and of u leave it exactly.

    A solution is accurate to float64. It comes with an :class:`~jdcore.errors.UnsolvedWarning`
    where its natural residual exceeds 1e-10 of ``1 + max z`` (with u scaled to
    ``max |D u| = 1``), four orders above what rounding C alone explains at a hundred rows.
    """

    def __call__(self, gramian: Floats, references: Floats, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param references: Vectors u [k, m].
        :returns: Vectors v [k, m], each ``>= u`` exactly.
        """
        if len(gramian) <= _FEW:
            few = project_few(gramian.tolist(), references.tolist())
            if few is not None:
                return np.array(few, dtype=np.float64).reshape(references.shape)
        # In the cone already, as the mean of the rows often is: told without numpy's reductions,
        # which would take longer than the rest.
        if len(references) == 1 and min(product(gramian, references[0]).tolist()) >= 0.0:
            return np.array(references)
        return _project(gramian, references)


def _project(gramian: Floats, references: Floats) -> Floats:
    cosines, norms, inverses = equilibrate(gramian)
    scaled = references * norms
    scales = np.abs(scaled).max(axis=1, keepdims=True)
    scaled /= np.where(scales > 0.0, scales, 1.0)
    solutions, residuals = _solve(cosines, scaled)
    warn_if_unsolved("dual_cone", float(residuals.max(initial=0.0)))
    solutions *= scales
    solutions *= inverses
    solutions += references
    return solutions


def _solve(C: Floats, U: Floats) -> tuple[Floats, Floats]:
    """Solutions of the LCPs with ``q = C u`` for the rows u of U, with their residuals."""
    Q = product(U, C)
    Z, residuals = solve_all(C, Q)
    if residuals.max(initial=0.0) > ROUGH:
        definite = nearest_semidefinite(C)
        if definite is not C:
            return _solve(definite, U)
        rescue(C, Q, Z, residuals)
    return Z, residuals
