"""
The LCP one pivot at a time, for what the block methods leave unsolved.

A Goldfarb-Idnani dual active-set method in z: slow but finite, and its passive rows are linearly
independent by construction. Lawson and Hanson's method, the usual choice, stalls when q is not in
the range of C.
"""

from __future__ import annotations

import numpy as np

from jdcore.linalg import product, solve
from jdplugins.standard._solvers._accuracy import Floats, pivot_tolerance

# A row whose squared distance to the span of the passive rows is below this depends on them.
_DEPENDENT = 1e-11


def solve_goldfarb_idnani(C: Floats, q: Floats) -> Floats | None:
    """
    Solve one LCP.

    :param C: Positive semi-definite matrix [m, m].
    :param q: Vector [m].
    :returns: z [m], or None if no z satisfies ``C z + q >= 0`` (to working precision).
    """
    m = len(q)
    z = np.zeros(m)
    y = q.copy()
    passive: list[int] = []
    for _ in range(10 * m + 20):
        slack = y.copy()
        slack[passive] = 0.0
        entering = int(slack.argmin())
        if slack[entering] >= -pivot_tolerance(m) * (1.0 + z.max()):
            break
        if not _enter(C, q, z, passive, entering):
            return None
        _refresh(C, q, z, passive)
        y = product(C, z) + q
    return z


def _enter(C: Floats, q: Floats, z: Floats, passive: list[int], entering: int) -> bool:
    """Raise ``z[entering]`` until its slack is zero, dropping the rows that block; in place."""
    row = C[entering]
    while True:
        direction = solve(C[np.ix_(passive, passive)], row[passive])
        curvature = row[entering] - row[passive] @ direction
        blocking, room = _first_to_vanish(z[passive], direction)
        gap = -(row @ z + q[entering])
        full = gap / curvature if curvature > _DEPENDENT else np.inf
        step = min(room, full)
        if step == np.inf:
            return False
        z[passive] = np.maximum(z[passive] - step * direction, 0.0)
        z[entering] += max(step, 0.0)
        if full <= room:
            passive.append(entering)
            return True
        z[passive[blocking]] = 0.0
        del passive[blocking]


def _first_to_vanish(z: Floats, direction: Floats) -> tuple[int, float]:
    shrinking = direction > 0.0
    if not shrinking.any():
        return -1, np.inf
    ratios = np.full_like(z, np.inf)
    np.divide(z, direction, out=ratios, where=shrinking)
    first = int(ratios.argmin())
    return first, float(ratios[first])


def _refresh(C: Floats, q: Floats, z: Floats, passive: list[int]) -> None:
    """Solve for the passive entries anew, which removes the rounding of the steps; in place."""
    fresh = solve(C[np.ix_(passive, passive)], -q[passive])
    if fresh.min() >= 0.0:
        z[:] = 0.0
        z[passive] = fresh
