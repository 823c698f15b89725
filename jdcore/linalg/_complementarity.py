"""
What an answer to a linear complementarity problem (LCP) is worth, and how to make the most of it.

The projection onto the dual cone and its relatives are LCPs in the cosines of the rows: find z >= 0
with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C is positive semi-definite with a unit diagonal
and q is of order one. Whoever solved it, and how, the two functions here apply.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jdcore.linalg._blas import product, solve

_EPS = 2.0**-52
# Proximal terms: each makes singular blocks solvable, and the next one corrects its bias.
_DELTAS = (1e-11, 1e-13)
# A backend's set of positive entries is nearly right. More exchanges than this would be a solver of
# its own, and hide that the backend failed.
_EXCHANGES = 6
_STEPS = 2
_BUDGET = 1 << 20  # entries of the matrices that are solved at once


def lcp_residual(
    C: NDArray[np.float64], Q: NDArray[np.float64], Z: NDArray[np.float64], /
) -> NDArray[np.float64]:
    """
    Natural residuals ``max |min(z, C z + q)|`` of answers, relative to ``1 + max z``.

    Zero for a solution. Float64 resolves about ``m * 1e-16``: so much comes from rounding
    ``C z + q`` alone.

    :param C: Cosines of the rows [m, m], float64.
    :param Q: Vectors q, one problem per row [k, m] (or a single one [m]).
    :param Z: Answers z >= 0, same shape.
    :returns: Residuals [k] (or a single number).

    >>> import numpy as np
    >>> lcp_residual(np.eye(2), np.array([[-1.0, 2.0]]), np.array([[0.5, 0.0]]))
    array([0.33333333])
    """
    violations = product(Z, C)
    violations += Q
    np.minimum(Z, violations, out=violations)
    np.abs(violations, out=violations)
    sizes = 1.0 + Z.max(axis=-1, initial=0.0)
    residuals: NDArray[np.float64] = violations.max(axis=-1, initial=0.0) / sizes
    return residuals


def refine_lcp(
    C: NDArray[np.float64], Q: NDArray[np.float64], Z: NDArray[np.float64], /
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Make approximate answers exact, if their positive entries are (nearly) the right ones.

    A solver that adds a multiple of the identity to C, or stops at a tolerance, errs in the values
    long before it errs in the set of entries that are positive. That set is taken from the answer,
    corrected by a few exchanges, and the values are solved for anew on C itself.

    :param C: Cosines of the rows [m, m], float64.
    :param Q: Vectors q, one problem per row [k, m].
    :param Z: Answers z >= 0 to a few digits [k, m]. Not modified.
    :returns: The refined answers [k, m], each the given one where refining gains nothing, and their
        :func:`lcp_residual` [k].

    >>> import numpy as np
    >>> C, Q = np.array([[1.0, -0.5], [-0.5, 1.0]]), np.array([[-1.0, 0.5]])
    >>> refine_lcp(C, Q, np.array([[0.999, 0.001]]))
    (array([[1., 0.]]), array([0.]))
    """
    m = Q.shape[1]
    best, residuals = Z.copy(), lcp_residual(C, Q, Z)
    passive = product(Z, C) + Q < Z
    chunk = max(1, _BUDGET // max(1, m * m))
    for delta in _DELTAS:
        left = np.flatnonzero(residuals > 6.0 * m * _EPS)
        for start in range(0, left.size, chunk):
            rows = left[start : start + chunk]
            candidates, passive[rows] = _solve_near(C, Q[rows], best[rows], passive[rows], delta)
            achieved = lcp_residual(C, Q[rows], candidates)
            better = achieved < residuals[rows]
            best[rows[better]] = candidates[better]
            residuals[rows[better]] = achieved[better]
    return best, residuals


def _solve_near(
    C: NDArray[np.float64],
    Q: NDArray[np.float64],
    centre: NDArray[np.float64],
    passive: NDArray[np.bool_],
    delta: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Block pivoting on ``C + delta I`` and ``q - delta centre``, then steps towards C itself."""
    B = delta * centre - Q
    Z = _solve_passive(C, B, passive, delta)
    for _ in range(_EXCHANGES):
        slack = product(Z, C) + delta * Z - B
        slack += 16.0 * C.shape[0] * _EPS * (1.0 + np.abs(Z).max(axis=1, keepdims=True))
        wrong = np.where(passive, Z, slack) < 0.0
        rows = np.flatnonzero(wrong.any(axis=1))
        if not rows.size:
            break
        passive = passive ^ wrong
        Z[rows] = _solve_passive(C, B[rows], passive[rows], delta)
    for _ in range(_STEPS):
        refined = Z - _solve_passive(C, product(Z, C) + Q, passive, delta)
        kept = refined.min(axis=1) < 0.0
        refined[kept] = Z[kept]
        Z = refined
    return np.maximum(Z, 0.0), passive


def _solve_passive(
    C: NDArray[np.float64], B: NDArray[np.float64], passive: NDArray[np.bool_], delta: float
) -> NDArray[np.float64]:
    """Rows z with ``(C_FF + delta I) z_F = b_F``, zero outside the passive set F of the row."""
    blocks = C * (passive[:, :, None] & passive[:, None, :])
    diagonal = np.arange(C.shape[0])
    blocks[:, diagonal, diagonal] = np.where(passive, 1.0 + delta, 1.0)
    return solve(blocks, (B * passive)[:, :, None])[:, :, 0]
