"""
The LCP for a handful of rows, in plain Python floats.

Up to about eight rows, the time of a solve in numpy is that of its calls; this path makes none.
"""

from __future__ import annotations

from collections.abc import Sequence

# Below this pivot the answer would lose more than a few digits: the numpy paths, which refine
# their solutions, then take over.
_SMALLEST_PIVOT = 1e-6
_TOLERANCE = 1e-14
_MAX_PIVOTS = 8


def solve_tiny(C: Sequence[Sequence[float]], q: Sequence[float]) -> list[float] | None:
    """
    Solve one LCP by block pivoting.

    :param C: Unit-diagonal positive semi-definite matrix, as m lists.
    :param q: The m entries of the vector.
    :returns: z, or None if the rows are too close to dependent for this path.
    """
    indices = range(len(q))
    passive = [j for j in indices if q[j] < -_TOLERANCE]
    for _ in range(_MAX_PIVOTS):
        values = _solve_passive(C, q, passive)
        if values is None:
            return None
        bad = [passive[a] for a, value in enumerate(values) if value < 0.0]
        for i in indices:
            if i not in passive:
                row, slack = C[i], q[i]
                for j, value in zip(passive, values, strict=True):
                    slack += row[j] * value
                if slack < -_TOLERANCE:
                    bad.append(i)
        if not bad:
            z = [0.0] * len(q)
            for j, value in zip(passive, values, strict=True):
                z[j] = value
            return z
        passive = [j for j in indices if (j in passive) != (j in bad)]
    return None


def solve_pair(c: float, p: float, q: float) -> tuple[float, float] | None:
    """:func:`solve_tiny` in closed form for the matrix [[1, c], [c, 1]] and the vector [p, q]."""
    if p >= -_TOLERANCE and q >= -_TOLERANCE:
        return 0.0, 0.0
    if p < 0.0 and q - c * p >= -_TOLERANCE:
        return -p, 0.0
    if q < 0.0 and p - c * q >= -_TOLERANCE:
        return 0.0, -q
    determinant = 1.0 - c * c
    if determinant < _SMALLEST_PIVOT:
        return None
    return max((c * q - p) / determinant, 0.0), max((c * p - q) / determinant, 0.0)


def _solve_passive(
    C: Sequence[Sequence[float]], q: Sequence[float], passive: list[int]
) -> Sequence[float] | None:
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
    return _solve_ldl(C, q, passive)


def _solve_ldl(
    C: Sequence[Sequence[float]], q: Sequence[float], passive: list[int]
) -> list[float] | None:
    """Solve ``C_FF z = -q_F`` by an LDLᵀ factorisation, with forward substitution on the way."""
    lower: list[list[float]] = []
    pivots: list[float] = []
    z: list[float] = []
    for i in passive:
        row = [C[i][j] for j in passive[: len(lower)]]
        pivot = 1.0
        rhs = -q[i]
        for b, other in enumerate(lower):
            scaled = row[b]  # = L_ib D_b
            for c in range(b):
                scaled -= row[c] * pivots[c] * other[c]
            entry = scaled / pivots[b]
            row[b] = entry
            pivot -= entry * scaled
            rhs -= entry * z[b]
        if pivot < _SMALLEST_PIVOT:
            return None
        lower.append(row)
        pivots.append(pivot)
        z.append(rhs)
    for a in range(len(z) - 1, -1, -1):
        z[a] /= pivots[a]
        for b in range(a + 1, len(z)):
            z[a] -= lower[b][a] * z[b]
    return z
