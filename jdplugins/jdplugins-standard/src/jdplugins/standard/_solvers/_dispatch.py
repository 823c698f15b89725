"""Which path solves which LCP."""

from __future__ import annotations

import numpy as np

from jdplugins.standard._solvers._accuracy import ROUGH, Floats, relative_residual
from jdplugins.standard._solvers._conjugate import solve_conjugate
from jdplugins.standard._solvers._dense import solve_dense
from jdplugins.standard._solvers._single import rescue, solve_single

_DENSE = 24  # up to this size, factorising all passive blocks beats conjugate gradients


def solve_lcp(C: Floats, Q: Floats) -> tuple[Floats, Floats]:
    """
    Solve the LCPs of all rows of Q by the path that is fastest for their number and size.

    :param C: Unit-diagonal positive semi-definite matrix [m, m].
    :param Q: Vectors q [k, m], of order one.
    :returns: Solutions Z [k, m] and their natural residuals relative to ``1 + max z`` [k].
    """
    k, m = Q.shape
    if k == 1:
        z, achieved = solve_single(C, Q[0])
        return z[None], np.array([achieved])
    if m <= _DENSE:
        Z, residual = solve_dense(C, Q)
    else:
        Z, residual = _solve_large(C, Q)
    for row in np.flatnonzero(residual > ROUGH):
        Z[row], residual[row] = rescue(C, Q[row], Z[row], residual[row])
    return Z, residual


def _solve_large(C: Floats, Q: Floats) -> tuple[Floats, Floats]:
    Z, solved, passive = solve_conjugate(C, Q)
    residual = relative_residual(C, Q, Z)
    hard = np.flatnonzero(~solved)
    if hard.size:
        Z[hard], residual[hard] = solve_dense(C, Q[hard], passive[hard])
    return Z, residual
