"""
The LCP for one right-hand side: the proximal block pivoting of the dense path, without its batches.

Only the passive block of C is factorised, and a good guess of the passive set saves pivots.
"""

from __future__ import annotations

import numpy as np

from jdcore.linalg import lcp_residual, product, solve
from jdplugins.standard._solvers._accuracy import (
    ROUGH,
    Floats,
    Indices,
    Mask,
    accepted,
    levels,
    pivot_tolerance,
)

_CREDIT = 3  # block exchanges that may fail to reduce the infeasibilities
_FIRST_PIVOTS = 30
_LATER_PIVOTS = 6
_REFINEMENTS = 2


def solve_single(
    C: Floats, q: Floats, passive: Mask | None = None, deltas: tuple[float, ...] | None = None
) -> tuple[Floats, float]:
    """
    Solve one LCP.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param q: Vector [m].
    :param passive: Where z is expected to be positive [m], if that is known roughly.
    :param deltas: :func:`levels` of C, if they are known.
    :returns: z [m] and its natural residual relative to ``1 + max z``.
    """
    m = len(q)
    z = np.zeros(m)
    residual = max(0.0, -float(q.min()))
    if residual <= pivot_tolerance(m) and (passive is None or not passive.any()):
        return z, residual
    F = _guess(C, q) if passive is None else passive
    for level, delta in enumerate(levels(C) if deltas is None else deltas):
        limit = _LATER_PIVOTS if level else _FIRST_PIVOTS
        candidate, F = _pivot(C, q, z, F, delta, limit)
        achieved = float(lcp_residual(C, q, candidate))
        previous = residual
        if achieved < residual:
            z, residual = candidate, achieved
        if residual <= accepted(m) or (residual <= ROUGH and achieved > 0.1 * previous):
            break
    return z, residual


def _guess(C: Floats, q: Floats) -> Mask:
    """The passive set after one projected gradient step: nearer the solution's than ``q < 0``."""
    z = np.maximum(-q, 0.0)
    return np.asarray(z > product(C, z) + q)


def _pivot(
    C: Floats, q: Floats, centre: Floats, F: Mask, delta: float, limit: int
) -> tuple[Floats, Mask]:
    """Solve the LCP of ``C + delta I`` and ``q - delta centre``, then refine towards that of C."""
    m = len(q)
    b = delta * centre - q
    shifted = C.copy()
    shifted.flat[:: m + 1] += delta
    tolerance = pivot_tolerance(m)
    fewest, credit = m + 1, _CREDIT
    z = np.zeros(m)
    for _ in range(limit):
        indices = F.nonzero()[0]
        block = shifted[indices[:, None], indices]
        z = np.zeros(m)
        z[indices] = solve(block, b[indices])
        y = product(C, z)
        y -= b
        y += tolerance * (1.0 + np.abs(z).max())
        bad = np.where(F, z, y) < 0.0
        count = int(np.count_nonzero(bad))
        if count == 0:
            if delta:
                _refine(C, q, z, indices, block)
            break
        if count < fewest:
            fewest, credit = count, _CREDIT
        else:
            credit -= 1
        if credit < 0:  # Murty's rule: it cannot cycle
            bad[: np.flatnonzero(bad)[-1]] = False
        F = F ^ bad
    return np.maximum(z, 0.0), F


def _refine(C: Floats, q: Floats, z: Floats, indices: Indices, block: Floats) -> None:
    """Steps towards the solution without the proximal term until a sign would change; in place."""
    for _ in range(_REFINEMENTS):
        step = solve(block, product(C[indices], z) + q[indices])
        refined = z[indices] - step
        if refined.min(initial=0.0) < 0.0:
            break
        z[indices] = refined
        if np.abs(step).max(initial=0.0) <= 1e-13 * (1.0 + refined.max(initial=0.0)):
            break
