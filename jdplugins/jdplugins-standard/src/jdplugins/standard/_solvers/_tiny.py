"""
The LCP for a handful of rows, in plain Python floats.

Up to about eight rows, the time of a solve in numpy is that of its calls; this path makes none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add, mul
from typing import TypeAlias

from jdplugins.standard._solvers._accuracy import DELTAS, ROUGH, accepted, pivot_tolerance

Rows: TypeAlias = Sequence[Sequence[float]]

# Below this pivot, solving for the passive entries directly would lose more than a few digits.
_SMALLEST_PIVOT = 1e-6
_TOLERANCE = 1e-14
_MAX_PIVOTS = 8
_REFINEMENTS = 2


def equilibrate_tiny(
    G: Rows,
) -> tuple[list[list[float]], list[float], list[float]] | None:
    """:func:`jdcore.linalg.equilibrate` of m lists; None if a row is zero."""
    squares = [row[i] for i, row in enumerate(G)]
    if min(squares, default=0.0) <= 0.0:
        return None
    norms = list(map(math.sqrt, squares))
    inverses = [1.0 / norm for norm in norms]
    C = [[x * inverse for x in map(mul, row, inverses)] for row, inverse in zip(G, inverses)]  # noqa: B905
    return C, norms, inverses


def solve_tiny(C: Rows, q: Sequence[float], dependent: bool = True) -> dict[int, float] | None:
    """
    Solve one LCP by block pivoting.

    :param C: Unit-diagonal positive semi-definite matrix, as m lists.
    :param q: The m entries of the vector.
    :param dependent: Whether to go on with proximal terms, as the numpy paths do, where the rows
        are too close to dependent. Many such problems with the same C are faster there.
    :returns: The entries of z that are not zero, by index; None if that did not find the solution.
    """
    indices = range(len(q))
    passive = [j for j in indices if q[j] < -_TOLERANCE]
    for _ in range(_MAX_PIVOTS):
        values = _solve_passive(C, q, passive)
        if values is None:
            return _solve_proximal(C, q) if dependent else None
        z = dict(zip(passive, values))  # noqa: B905
        bad = [j for j in passive if z[j] < 0.0] if values and min(values) < 0.0 else []
        for i in indices:
            if i not in z:
                row, slack = C[i], q[i]
                for j in passive:
                    slack += row[j] * z[j]
                if slack < -_TOLERANCE:
                    bad.append(i)
        if not bad:
            return z
        passive = [j for j in indices if (j in z) != (j in bad)]
    return None


def _solve_proximal(C: Rows, q: Sequence[float]) -> dict[int, float] | None:
    m = len(q)
    z, residual = [0.0] * m, -min(q)
    passive = [j for j in range(m) if q[j] < -_TOLERANCE]
    for delta in DELTAS:
        b = [x - delta * t for t, x in zip(z, q, strict=True)]
        found = _solve_level(C, q, b, passive, delta)
        if found is None:
            return None
        candidate, passive = found
        y = _slacks(C, q, candidate)
        achieved = max(abs(min(t, x)) for t, x in zip(candidate, y, strict=True))
        achieved /= 1.0 + max(candidate)
        previous = residual
        if achieved < residual:
            z, residual = candidate, achieved
        if residual <= accepted(m) or (residual <= ROUGH and achieved > 0.1 * previous):
            break
    return dict(enumerate(z)) if residual <= ROUGH else None


def _solve_level(
    C: Rows,
    q: Sequence[float],
    b: list[float],
    passive: list[int],
    delta: float,
) -> tuple[list[float], list[int]] | None:
    """The LCP of ``C + delta I`` and b, refined towards that of C and q; and its passive set."""
    indices = range(len(b))
    diagonal = [1.0 + delta] * len(b)
    for _ in range(_MAX_PIVOTS):
        values = solve_ldl(C, b, passive, diagonal, 0.0)
        if values is None:
            return None
        z = _spread(values, passive, len(b))
        slack = -pivot_tolerance(len(b)) * (1.0 + max(max(z), -min(z)))
        y = _slacks(C, b, z)
        bad = [j for j in indices if (z[j] < 0.0 if j in passive else y[j] < slack)]
        if not bad:
            return _refine(C, q, z, passive, delta), passive
        passive = [j for j in indices if (j in passive) != (j in bad)]
    return None


def _refine(
    C: Rows,
    q: Sequence[float],
    z: list[float],
    passive: list[int],
    delta: float,
) -> list[float]:
    """Steps towards the solution without the proximal term until a sign would change."""
    diagonal = [1.0 + delta] * len(z)
    for _ in range(_REFINEMENTS):
        values = solve_ldl(C, _slacks(C, q, z), passive, diagonal, 0.0)
        if values is None:
            break
        step = _spread(values, passive, len(z))
        refined = list(map(add, z, step))
        if min(refined) < 0.0:
            break
        z = refined
    return z


def _slacks(C: Rows, q: Sequence[float], z: list[float]) -> list[float]:
    return [x + sum(map(mul, row, z)) for x, row in zip(q, C, strict=True)]


def _spread(values: Sequence[float], passive: list[int], m: int) -> list[float]:
    z = [0.0] * m
    for j, value in zip(passive, values, strict=True):
        z[j] = value
    return z


def solve_pair(a: float, b: float, c: float, p: float, q: float) -> tuple[float, float] | None:
    """
    Solve the LCP of the matrix [[a, c], [c, b]] and the vector [p, q] in closed form.

    :param a: Positive, as is b. Products of two arguments must not leave the range of float64.
    :returns: Both entries of z; None where the rows are nearly parallel.
    """
    if p >= 0.0 and q >= 0.0:
        return 0.0, 0.0
    if p < 0.0 and a * q >= c * p:
        return -p / a, 0.0
    if q < 0.0 and b * p >= c * q:
        return 0.0, -q / b
    determinant = a * b - c * c
    if determinant < _SMALLEST_PIVOT * a * b:
        return None
    return max((c * q - b * p) / determinant, 0.0), max((c * p - a * q) / determinant, 0.0)


def _solve_passive(C: Rows, q: Sequence[float], passive: list[int]) -> Sequence[float] | None:
    if not passive:
        return ()
    a = passive[0]
    if len(passive) == 1:
        return (-q[a],)
    if len(passive) == 2:
        b = passive[1]
        c = C[a][b]
        determinant = 1.0 - c * c
        if determinant < _SMALLEST_PIVOT:
            return None
        return (c * q[b] - q[a]) / determinant, (c * q[a] - q[b]) / determinant
    if len(passive) == 3:
        return _solve_three(C, q, passive)
    return solve_ldl(C, q, passive, [1.0] * len(q), _SMALLEST_PIVOT)


def _solve_three(C: Rows, q: Sequence[float], passive: list[int]) -> Sequence[float] | None:
    """:func:`solve_ldl` unrolled, which takes half the time."""
    i, j, k = passive
    ji, ki = C[j][i], C[k][i]
    second = 1.0 - ji * ji
    if second <= _SMALLEST_PIVOT:
        return None
    kj = (C[k][j] - ki * ji) / second
    third = 1.0 - ki * ki - kj * kj * second
    if third <= _SMALLEST_PIVOT:
        return None
    y = ji * q[i] - q[j]
    z = (ki * q[i] - kj * y - q[k]) / third
    y = y / second - kj * z
    return -q[i] - ji * y - ki * z, y, z


def solve_ldl(
    C: Rows,
    q: Sequence[float],
    passive: list[int],
    diagonal: Sequence[float],
    smallest: float,
) -> list[float] | None:
    """
    Solve ``C_FF z = -q_F`` by an LDLᵀ factorisation, with forward substitution on the way.

    :param diagonal: Its m entries stand for the diagonal of C.
    :param smallest: Up to this pivot, the result is None.
    """
    lower: list[list[float]] = []
    pivots: list[float] = []
    z: list[float] = []
    for i in passive:
        row = [C[i][j] for j in passive[: len(lower)]]
        pivot = diagonal[i]
        rhs = -q[i]
        for b, other in enumerate(lower):
            scaled = row[b]  # = L_ib D_b
            for c in range(b):
                scaled -= row[c] * pivots[c] * other[c]
            entry = scaled / pivots[b]
            row[b] = entry
            pivot -= entry * scaled
            rhs -= entry * z[b]
        if pivot <= smallest:
            return None
        lower.append(row)
        pivots.append(pivot)
        z.append(rhs)
    for a in range(len(z) - 1, -1, -1):
        z[a] /= pivots[a]
        for b in range(a + 1, len(z)):
            z[a] -= lower[b][a] * z[b]
    return z
