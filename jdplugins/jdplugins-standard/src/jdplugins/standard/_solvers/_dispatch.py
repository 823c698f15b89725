"""Which path solves which LCP."""

from __future__ import annotations

import numpy as np

from jdcore.linalg import lcp_residual
from jdplugins.standard._solvers._accuracy import REGULAR, ROUGH, Floats, Mask, levels
from jdplugins.standard._solvers._conjugate import solve_conjugate
from jdplugins.standard._solvers._dense import solve_dense
from jdplugins.standard._solvers._goldfarb import solve_goldfarb_idnani
from jdplugins.standard._solvers._single import solve_single

# Up to this size, factorising all passive blocks beats conjugate gradients; and up to this one on
# dependent rows, where conjugate gradients hardly converge.
_DENSE, _DEPENDENT = 20, 96


def solve_one(
    C: Floats, q: Floats, passive: Mask | None = None, deltas: tuple[float, ...] | None = None
) -> tuple[Floats, float]:
    """:func:`solve_single`, followed by :func:`rescue` if need be."""
    z, achieved = solve_single(C, q, passive, deltas)
    if achieved <= ROUGH:
        return z, achieved
    Z, residual = z[None], np.array([achieved])
    rescue(C, q[None], Z, residual)
    return Z[0], float(residual[0])


def solve_all(C: Floats, Q: Floats) -> tuple[Floats, Floats]:
    """
    Solve the LCPs of all rows of Q by the block method that is fastest for their number and size.

    :param C: Unit-diagonal positive semi-definite matrix [m, m].
    :param Q: Vectors q [k, m], of order one.
    :returns: Solutions Z [k, m] and their natural residuals relative to ``1 + max z`` [k].
    """
    k, m = Q.shape
    if k == 1:
        z, achieved = solve_single(C, Q[0])
        return z[None], np.array([achieved])
    if m <= _DENSE:
        return solve_dense(C, Q)
    deltas = levels(C) if m <= _DEPENDENT else None
    if deltas not in (None, REGULAR):
        return solve_dense(C, Q, deltas=deltas)
    Z, solved, passive = solve_conjugate(C, Q)
    residual = lcp_residual(C, Q, Z)
    hard = np.flatnonzero(~solved)
    if hard.size:
        Z[hard], residual[hard] = solve_dense(C, Q[hard], passive[hard], deltas)
    return Z, residual


def rescue(C: Floats, Q: Floats, Z: Floats, residual: Floats) -> None:
    """Improve rough solutions by the one-pivot-at-a-time method where that is better; in place."""
    for row in np.flatnonzero(residual > ROUGH):
        slow = solve_goldfarb_idnani(C, Q[row])
        if slow is None:
            continue
        achieved = lcp_residual(C, Q[row], slow)
        if achieved < residual[row]:
            Z[row], residual[row] = slow, achieved
