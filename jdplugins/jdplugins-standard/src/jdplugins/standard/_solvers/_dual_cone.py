from __future__ import annotations

import math
from operator import mul

import numpy as np
from attrs import frozen

from jdcore.linalg import equilibrate, product
from jdplugins.standard._solvers._accuracy import ROUGH, Floats, warn_if_unsolved
from jdplugins.standard._solvers._dispatch import rescue, solve_all
from jdplugins.standard._solvers._semidefinite import nearest_semidefinite
from jdplugins.standard._solvers._tiny import solve_pair, solve_tiny

# Up to this size, Python floats beat numpy; and up to this one also if the rows are dependent.
_TINY, _TINIEST = 8, 5


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
        if m > 2 and len(references) == 1 and (product(references, gramian) >= 0.0).all():
            return np.array(references)  # in the cone already, as the mean of the rows often is
        if m <= _TINY and len(references):
            project = _project_two if m == 2 else _project_tiny
            tiny = project(gramian.tolist(), references.tolist())
            if tiny is not None:
                return np.array(tiny)
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


def _project_tiny(G: list[list[float]], references: list[list[float]]) -> list[list[float]] | None:
    """:func:`_project` without numpy; None for zero or nearly dependent rows."""
    squares = [row[i] for i, row in enumerate(G)]
    if min(squares, default=0.0) == 0.0:
        return None
    norms = [math.sqrt(square) for square in squares]
    C = [
        [g / (norm * other) for g, other in zip(row, norms, strict=True)]
        for row, norm in zip(G, norms, strict=True)
    ]
    projected = []
    dependent = len(references) == 1 or len(C) <= _TINIEST
    for u in references:
        v = _project_one(C, norms, u, dependent)
        if v is None:
            return None
        projected.append(v)
    return projected


def _project_one(
    C: list[list[float]], norms: list[float], u: list[float], dependent: bool
) -> list[float] | None:
    sought = [j for j, x in enumerate(u) if x != 0.0]
    if len(sought) == 1:  # UPGrad: u is a multiple of a unit vector
        [i] = sought
        if len(u) == 3 and u[i] > 0.0:
            return _project_row_of_three(C, norms, u, i)
        scale = abs(u[i]) * norms[i]
        q = C[i] if u[i] > 0.0 else [-c for c in C[i]]
    elif not sought:
        return u
    else:
        scaled = [x * norm for x, norm in zip(u, norms, strict=True)]
        scale = max(max(scaled), -min(scaled))
        unit = [x / scale for x in scaled]
        q = [sum(map(mul, row, unit)) for row in C]
    if min(q) >= 0.0:
        return u
    z = solve_tiny(C, q, dependent=dependent)
    if z is None:
        return None
    return [x + scale * t / norm for x, t, norm in zip(u, z, norms, strict=True)]


def _project_row_of_three(
    C: list[list[float]], norms: list[float], u: list[float], i: int
) -> list[float] | None:
    """A row never conflicts with its own projection, so only two entries of z can be positive."""
    j, k = i - 2, i - 1
    pair = solve_pair(C[j][k], C[i][j], C[i][k])
    if pair is None:
        return None
    scale = u[i] * norms[i]
    v = u.copy()
    v[j], v[k] = scale * pair[0] / norms[j], scale * pair[1] / norms[k]
    return v


def _project_two(G: list[list[float]], references: list[list[float]]) -> list[list[float]] | None:
    """Closed form: only one of two rows can take the other's conflict away, or v is zero."""
    (g00, g01), (_, g11) = G
    if g00 == 0.0 or g11 == 0.0:
        return None
    r0, r1 = -g01 / g00, -g01 / g11
    projected = []
    for u0, u1 in references:
        v0 = r0 * u1 if u1 > 0.0 else 0.0
        v1 = r1 * u0 if u0 > 0.0 else 0.0
        if u0 > 0.0 or u1 > 0.0:
            projected.append([max(u0, v0), max(u1, v1)])
        else:
            projected.append([0.0, 0.0])
    return projected
