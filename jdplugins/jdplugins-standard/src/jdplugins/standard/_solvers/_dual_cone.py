from __future__ import annotations

import math

import numpy as np
from attrs import frozen

from jdcore.linalg import equilibrate
from jdplugins.standard._solvers._accuracy import Floats, warn_if_unsolved
from jdplugins.standard._solvers._dispatch import solve_lcp
from jdplugins.standard._solvers._tiny import solve_tiny

_TINY = 6


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
        m = len(gramian)
        if m == 2 and gramian[0, 0] > 0.0 and gramian[1, 1] > 0.0:
            return _project_two(gramian, references)
        if m <= _TINY:
            tiny = _project_tiny(gramian.tolist(), references.tolist())
            if tiny is not None:
                return np.array(tiny).reshape(references.shape)
        return _project(gramian, references)


def _project(gramian: Floats, references: Floats) -> Floats:
    cosines, norms, inverses = equilibrate(gramian)
    scaled = references * norms
    scales = np.abs(scaled).max(axis=1, keepdims=True)
    scaled /= np.where(scales > 0.0, scales, 1.0)
    solutions, residuals = solve_lcp(cosines, scaled @ cosines)
    warn_if_unsolved("dual_cone", float(residuals.max(initial=0.0)))
    solutions *= scales
    solutions *= inverses
    solutions += references
    return solutions


def _project_two(gramian: Floats, references: Floats) -> Floats:
    """Closed form for two non-zero rows: the one takes the other's conflict away, or v is zero."""
    (g00, g01), (_, g11) = gramian.tolist()
    r0, r1 = -g01 / g00, -g01 / g11
    projected = []
    for u0, u1 in references.tolist():
        if u0 <= 0.0 and u1 <= 0.0:
            projected.append((0.0, 0.0))
        else:
            projected.append((max(u0, r0 * max(u1, 0.0)), max(u1, r1 * max(u0, 0.0))))
    return np.array(projected).reshape(references.shape)


def _project_tiny(G: list[list[float]], references: list[list[float]]) -> list[list[float]] | None:
    norms = [math.sqrt(row[i]) for i, row in enumerate(G)]
    if min(norms) == 0.0:
        return None
    C = [[g / (a * b) for g, b in zip(row, norms)] for row, a in zip(G, norms)]
    m = range(len(G))
    projected = []
    for u in references:
        scaled = [x * d for x, d in zip(u, norms)]
        scale = max(max(scaled), -min(scaled))
        if scale == 0.0:
            projected.append(u)
            continue
        terms = [(C[j], x / scale) for j, x in enumerate(scaled) if x != 0.0]
        z = solve_tiny(C, [sum(row[i] * x for row, x in terms) for i in m])
        if z is None:
            return None
        projected.append([x + scale * t / d for x, t, d in zip(u, z, norms)])
    return projected
