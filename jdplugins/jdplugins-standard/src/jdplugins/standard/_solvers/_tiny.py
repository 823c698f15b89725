"""
Linear complementarity problems (LCP) of a handful of rows, in plain Python floats.

Up to about eight rows, the time of a solve in numpy is that of its calls; this path makes none.
Rows keep their lengths, since a Cholesky factorisation is as exact for one scaling as for another:
only tolerances are relative to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Rows: TypeAlias = Sequence[Sequence[float]]

HANDFUL, HANDFUL_OF_ONE = 8, 12
"""Rows up to which calls of numpy take longer than the arithmetic; for one vector to project."""

_TOLERANCE = 1e-14
_CREDIT = 4  # exchanges that may fail to reduce the number of wrong entries
# Relative pivots: down to the first, values are right to many digits; down to the second, they may
# be good enough, which their residual tells.
_SMALLEST_PIVOT, _DEPENDENT_PIVOT, _ROUGH = 1e-6, 1e-13, 1e-15


def roots_of(A: Rows) -> list[float]:
    """The lengths of the rows whose Gramian is A."""
    return [math.sqrt(row[i]) for i, row in enumerate(A)]


def solve_few(
    A: Rows, q: Sequence[float], roots: Sequence[float], size: float
) -> dict[int, float] | None:
    """
    Find z >= 0 with ``y = A z + q >= 0`` and ``zᵀ y = 0``, by block pivoting.

    :param A: Positive semi-definite matrix, as m lists; zero rows are left alone.
    :param q: The m entries of the vector.
    :param roots: Those of the diagonal of A.
    :param size: The length of a vector whose inner products with the rows q may be.
    :returns: The entries of z that are not zero, by index; None if that did not find the solution.
    """
    indices = range(len(q))
    tolerance = _TOLERANCE * size
    passive = [j for j in indices if q[j] < -tolerance * roots[j]]
    dependent, credit, fewest = False, _CREDIT, len(q) + 1
    while credit:
        values = _solve_passive(A, q, passive)
        if values is None:
            dependent = True
            values = solve_ldl(A, q, passive, _DEPENDENT_PIVOT)
            if values is None:
                return None
        z = dict(zip(passive, values))  # noqa: B905
        largest = size
        if dependent and z:
            largest += max([roots[j] * x for j, x in z.items()])
            tolerance = _TOLERANCE * largest
        bad = [j for j in passive if z[j] < 0.0] if z and min(values) < 0.0 else []
        bad += [i for i in indices if i not in z and _slack(A[i], q[i], z) < -tolerance * roots[i]]
        if not bad:
            limit = _ROUGH * largest
            rough = dependent and any(abs(_slack(A[i], q[i], z)) > limit * roots[i] for i in z)
            return None if rough else z
        credit, fewest = (_CREDIT, len(bad)) if len(bad) < fewest else (credit - 1, fewest)
        # Entries with a wrong sign change sides, all at once.
        passive = [j for j in indices if (j in z) != (j in bad)]
    return None


def _slack(row: Sequence[float], slack: float, z: dict[int, float]) -> float:
    for j, value in z.items():
        slack += row[j] * value
    return slack


def _solve_passive(A: Rows, q: Sequence[float], passive: list[int]) -> Sequence[float] | None:
    """:func:`solve_ldl`, unrolled for up to three entries, which takes a fraction of the time."""
    if len(passive) > 3:
        return solve_ldl(A, q, passive, _SMALLEST_PIVOT)
    if not passive:
        return ()
    i = passive[0]
    ii = A[i][i]
    if ii <= 0.0:  # a row whose squared length is below the range of floats
        return None
    if len(passive) == 1:
        return (-q[i] / ii,)
    j = passive[1]
    ij, jj = A[i][j], A[j][j]
    ji = ij / ii
    second = jj - ji * ij
    if second <= _SMALLEST_PIVOT * jj:
        return None
    y = ji * q[i] - q[j]
    if len(passive) == 2:
        y /= second
        return (-q[i] - ij * y) / ii, y
    k = passive[2]
    ik, kk = A[i][k], A[k][k]
    ki = ik / ii
    jk = A[j][k] - ki * ij
    kj = jk / second
    third = kk - ki * ik - kj * jk
    if third <= _SMALLEST_PIVOT * kk:
        return None
    z = (ki * q[i] - kj * y - q[k]) / third
    y = y / second - kj * z
    return (-q[i] - ij * y - ik * z) / ii, y, z


def solve_ldl(
    A: Rows, q: Sequence[float], passive: list[int], smallest: float = _SMALLEST_PIVOT
) -> list[float] | None:
    """
    Solve ``A_FF z = -q_F`` by an LDLᵀ factorisation, with forward substitution on the way.

    :param smallest: Up to this pivot, relative to the diagonal of A, the result is None.
    """
    lower: list[list[float]] = []
    pivots: list[float] = []
    z: list[float] = []
    for i in passive:
        row = [A[i][j] for j in passive[: len(lower)]]
        pivot = A[i][i]
        rhs = -q[i]
        for b, other in enumerate(lower):
            scaled = row[b]  # = L_ib D_b
            for c in range(b):
                scaled -= row[c] * pivots[c] * other[c]
            entry = scaled / pivots[b]
            row[b] = entry
            pivot -= entry * scaled
            rhs -= entry * z[b]
        if pivot <= smallest * A[i][i]:
            return None
        lower.append(row)
        pivots.append(pivot)
        z.append(rhs)
    for a in range(len(z) - 1, -1, -1):
        z[a] /= pivots[a]
        for b in range(a + 1, len(z)):
            z[a] -= lower[b][a] * z[b]
    return z
