"""
What an answer to a linear complementarity problem (LCP) is worth, and how to make the most of it.

The projection onto the dual cone and its relatives are LCPs in the cosines of the rows: find z >= 0
with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C is positive semi-definite with a unit diagonal
and q is of order one. The two functions here apply to any solution of it, however it was found.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from jdcore.linalg._blas import product
from jdcore.linalg._pivoting import EPS, natural_residual, pivot

# Proximal terms: each makes singular blocks solvable, and the next one corrects its bias.
_DELTAS = (1e-11, 1e-13)
# A backend's set of positive entries is nearly right. More exchanges than this would be a solver of
# its own, and hide that the backend failed.
_ROUNDS = 7


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
    if not Q.size:
        return Z.copy(), np.zeros(len(Q))
    c, q, best = (torch.from_numpy(array) for array in (C, Q, Z.copy()))
    residuals = natural_residual(c, q, best)
    passive = torch.addmm(q, best, c) < best
    for delta in _DELTAS:
        rows = (residuals > 6.0 * len(C) * EPS).nonzero()[:, 0]
        if not len(rows):
            break
        sets, before = passive[rows], best[rows]
        found, achieved = pivot(c, q[rows], sets, delta=delta, centre=before, rounds=_ROUNDS)
        passive[rows] = sets
        better = achieved < residuals[rows]
        best[rows] = torch.where(better[:, None], found, before)
        residuals[rows] = torch.where(better, achieved, residuals[rows])
    return best.numpy(), lcp_residual(C, Q, best.numpy())
