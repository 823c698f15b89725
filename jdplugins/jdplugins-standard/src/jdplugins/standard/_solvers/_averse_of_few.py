"""
The best worst case of a handful of rows, in plain Python floats.

The same search as for many rows, which ends here as soon as the closed formula of a passive set
solves the problem. What is harder than that (rows that nearly depend on each other, points that are
nearly stationary) is left to the search itself.
"""

from __future__ import annotations

import math
from operator import mul

from jdcore.linalg import EPS
from jdplugins.standard._solvers._tiny import Rows, roots_of, solve_few, solve_ldl

Floats = list[float]

_ROUNDS = 8
_SHORT = 1e-6  # length of the mean, relative to that of the longest row
_EXACT = 1e-14
STATIONARY = 256.0 * EPS  # times the number of rows: what is zero to float64


def avert_few(G: Rows, c: float, level: float) -> tuple[Floats, float] | None:
    """
    The weights of the direction ``d`` that :class:`NativeConflictAverseSolver` looks for.

    :param G: Gramian, as m lists.
    :param c: Radius of the ball relative to the norm of the mean, > 0.
    :param level: The proximal term that G contains, relative to its diagonal.
    :returns: The m weights, and the residual of the linear complementarity problem that they solve;
        None where that takes more.
    """
    m, roots = len(G), roots_of(G)
    towards = [sum(row) / m for row in G]
    length = math.sqrt(max(sum(towards) / m, 0.0))
    if not min(roots) > 0.0 or length < _SHORT * max(roots):
        return None
    found = _search(G, towards, roots, c * length, max(1.0, c) * length)
    if found is None:
        return None
    v, best, residual = found
    # All points of the convex hull are at least this far from zero, as d is that far along them; or
    # some row loses as much.
    distance = best / ((1.0 + c) * length)
    if distance**2 <= max(STATIONARY * m * min(roots) ** 2, 2.0 * level * max(roots) ** 2):
        return None
    return [1.0 / m + x for x in v], residual


def _search(
    G: Rows, b: Floats, roots: Floats, radius: float, size: float
) -> tuple[Floats, float, float] | None:
    """The v of ``d = g0 + Jᵀ v``, its level, and its residual."""
    # No level is above the least of what each row can be lifted to by the whole radius; that row is
    # active near there.
    uppermost = [x + radius * root for x, root in zip(b, roots, strict=True)]
    passive = [uppermost.index(min(uppermost))]
    for _ in range(_ROUNDS):
        found = _on(G, b, passive, radius)
        if found is None:
            return None
        level, v = found
        q = [x - level for x in b]
        # Of z and G z + q, the smaller one has to be zero.
        gaps = [
            min(z * root, (sum(map(mul, row, v)) + x) / root)
            for z, root, row, x in zip(v, roots, G, q, strict=True)
        ]
        residual = max(map(abs, gaps)) / (size + max(map(mul, v, roots)))
        if residual <= _EXACT:
            return [max(z, 0.0) for z in v], level, residual
        solved = solve_few(G, q, roots, size)
        # The set of this level again, whose formula has just been found wrong: rounding decides.
        if solved is None or sorted(solved) == passive:
            return None
        passive = sorted(solved)
    return None


def _on(G: Rows, b: Floats, passive: list[int], radius: float) -> tuple[float, Floats] | None:
    """The level at which the norm is the radius if the passive set is that, and v."""
    along = solve_ldl(G, [-1.0] * len(G), passive)
    against = solve_ldl(G, [-x for x in b], passive)
    if along is None or against is None:
        return None
    aa, ab = sum(along), sum(against)
    bb = sum([b[i] * x for i, x in zip(passive, against, strict=True)])
    discriminant = ab * ab - aa * (bb - radius * radius)
    if not (discriminant >= 0.0 and aa > 0.0):  # as where rows differ by very much in length
        return None
    level = (ab + math.sqrt(discriminant)) / aa
    v = [0.0] * len(G)
    for i, x, y in zip(passive, along, against, strict=True):
        v[i] = level * x - y
    return (level, v) if math.isfinite(sum(v)) else None
