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
from jdplugins.standard._solvers._tiny import equilibrate_tiny, solve_ldl, solve_tiny

Rows = list[list[float]]
Floats = list[float]

_ROUNDS = 8
_SMALLEST_PIVOT = 1e-6
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
    equilibrated = equilibrate_tiny(G)
    if equilibrated is None:
        return None
    C, norms, inverses = equilibrated
    m, largest, shortest = len(G), max(norms), min(norms)
    mean = [norm / (largest * m) for norm in norms]
    towards = [sum(map(mul, row, mean)) for row in C]
    length = math.sqrt(max(sum(map(mul, mean, towards)), 0.0))
    if length < _SHORT:
        return None
    unit = 1.0 / (max(1.0, c) * length)
    a = [shortest * inverse for inverse in inverses]
    b = [x * unit for x in towards]
    found = _search(C, a, b, c * length * unit)
    if found is None:
        return None
    v, best, residual = found
    # All points of the convex hull are at least this far from zero, as d is that far along them; or
    # some row loses as much.
    distance = best / ((1.0 + c) * length * unit)
    if distance**2 <= max(STATIONARY * m, 2.0 * level / min(a) ** 2):
        return None
    scale = largest / unit
    return [1.0 / m + scale * x * y for x, y in zip(v, inverses, strict=True)], residual


def _search(C: Rows, a: Floats, b: Floats, radius: float) -> tuple[Floats, float, float] | None:
    """The v of ``d = g0 + Jᵀ v``, its level, and its residual."""
    uppermost = [(x + radius) / y for x, y in zip(b, a, strict=True)]
    highest = min(uppermost)
    # No level is above the least of what each row can be lifted to by the whole radius; that row is
    # active near there.
    passive = [uppermost.index(highest)]
    for _ in range(_ROUNDS):
        found = _on(C, a, b, passive, radius)
        if found is None:
            return None
        level, v = found
        q = [x - level * y for x, y in zip(b, a, strict=True)]
        # Of z and C z + q, the smaller one has to be zero.
        gaps = [min(z, sum(map(mul, row, v)) + y) for z, row, y in zip(v, C, q, strict=True)]
        residual = max(map(abs, gaps)) / (1.0 + max(v))
        if residual <= _EXACT:
            return [max(z, 0.0) for z in v], level, residual
        solved = solve_tiny(C, q)
        # The set of this level again, whose formula has just been found wrong: rounding decides.
        if solved is None or sorted(solved) == passive:
            return None
        passive = sorted(solved)
    return None


def _on(
    C: Rows, a: Floats, b: Floats, passive: list[int], radius: float
) -> tuple[float, Floats] | None:
    """The level at which the norm is the radius if the passive set is that, and v."""
    ones = [1.0] * len(a)
    along = solve_ldl(C, [-x for x in a], passive, ones, _SMALLEST_PIVOT)
    against = solve_ldl(C, [-x for x in b], passive, ones, _SMALLEST_PIVOT)
    if along is None or against is None:
        return None
    passive_a, passive_b = [a[i] for i in passive], [b[i] for i in passive]
    aa, ab = sum(map(mul, passive_a, along)), sum(map(mul, passive_a, against))
    bb = sum(map(mul, passive_b, against))
    discriminant = ab * ab - aa * (bb - radius * radius)
    if discriminant < 0.0:
        return None
    level = (ab + math.sqrt(discriminant)) / aa
    v = [0.0] * len(a)
    for i, x, y in zip(passive, along, against, strict=True):
        v[i] = level * x - y
    return level, v
