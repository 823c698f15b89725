"""
The LCP for a handful of rows, in plain Python floats.

Up to about eight rows, the time of a solve in numpy is that of its calls; this path makes none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import TypeAlias

Rows: TypeAlias = Sequence[Sequence[float]]

# Below this pivot, solving for the passive entries directly would lose more than a few digits.
_SMALLEST_PIVOT = 1e-6
_TOLERANCE = 1e-14
_MAX_PIVOTS = 8
# Down to this one, they may still be good enough, which their residual tells.
_DEPENDENT_PIVOT, _ROUGH = 1e-13, 1e-15


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


def solve_tiny(C: Rows, q: Sequence[float]) -> dict[int, float] | None:
    """
    Solve one LCP by block pivoting.

    :param C: Unit-diagonal positive semi-definite matrix, as m lists.
    :param q: The m entries of the vector.
    :returns: The entries of z that are not zero, by index; None if that did not find the solution.
    """
    indices = range(len(q))
    passive = [j for j in indices if q[j] < -_TOLERANCE]
    dependent = False
    for _ in range(_MAX_PIVOTS):
        values = _solve_passive(C, q, passive)
        if values is None:
            dependent = True
            values = solve_ldl(C, q, passive, [1.0] * len(q), _DEPENDENT_PIVOT)
            if values is None:
                return None
        z = dict(zip(passive, values))  # noqa: B905
        bad = [j for j in passive if z[j] < 0.0] if values and min(values) < 0.0 else []
        tolerance = _TOLERANCE * (1.0 + max(values, default=0.0)) if dependent else _TOLERANCE
        bad += [i for i in indices if i not in z and _slack(C[i], q[i], z) < -tolerance]
        if not bad:
            return None if dependent and _is_rough(C, q, z) else z
        # Entries with a wrong sign change sides, all at once.
        passive = [j for j in indices if (j in z) != (j in bad)]
    return None


def _slack(row: Sequence[float], slack: float, z: dict[int, float]) -> float:
    for j, value in z.items():
        slack += row[j] * value
    return slack


def _is_rough(C: Rows, q: Sequence[float], z: dict[int, float]) -> bool:
    """Whether the values that were found from nearly dependent rows leave a residual."""
    limit = _ROUGH * (1.0 + max(z.values(), default=0.0))
    return any(abs(_slack(C[i], q[i], z)) > limit for i in z)


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
