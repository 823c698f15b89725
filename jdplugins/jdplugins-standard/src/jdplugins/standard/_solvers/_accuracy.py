"""
What "solved" means for the linear complementarity problem (LCP) all native solvers share.

Find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C [m, m] is positive semi-definite
with unit diagonal and q [m] is of order one. How far a z is from that is measured by its natural
residual ``max |min(z, y)|``, relative to ``1 + max z``: even for the exact z, y cannot be computed
more accurately than about ``m * EPS * (1 + max z)``.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from jdcore.errors import UnsolvedWarning, warn
from jdcore.linalg import cholesky

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]

EPS = 2.0**-52

DELTAS = (1e-8, 1e-11, 1e-13)
"""
Proximal terms of the successive levels of a solve.

The first must be this large: with 1e-14, the signs of y are noise on dependent rows, and block
pivoting needs six times as many steps or does not finish. The bias is removed by refinement, and by
the later levels where the rows are nearly dependent.
"""

REGULAR = (0.0,)
"""Levels on independent rows: they need no proximal term, hence no refinement either."""

_SMALLEST_PIVOT = 1e-6

ROUGH = 1e-11
"""Relative residual above which a solve is handed to the one-pivot-at-a-time method."""

UNSOLVED = 1e-10
"""
Relative residual that is worth a warning.

Rounding C alone explains some ``m * EPS``, four orders less at m = 100; that margin covers solves
that are as accurate as nearly dependent rows permit.
"""


def levels(C: Floats) -> tuple[float, ...]:
    """Proximal terms for a matrix of cosines: none where a Cholesky factorisation is safe."""
    try:
        smallest = cholesky(C).diagonal().min()
    except np.linalg.LinAlgError:
        return DELTAS
    return REGULAR if smallest * smallest > _SMALLEST_PIVOT else DELTAS


def pivot_tolerance(m: int) -> float:
    """Entries of y above minus this (times ``1 + max z``) count as non-negative."""
    return 16.0 * m * EPS


def infeasible(y: Floats) -> Mask:
    """Which entries of y (of its last dimension m) are negative beyond rounding."""
    below: Mask = y < -pivot_tolerance(y.shape[-1])
    return below


def accepted(m: int) -> float:
    """
    Relative residual at which no further level can improve the solution.

    A laxer limit costs digits: the residual of an error along an eigenvector of C is that error
    times the eigenvalue.
    """
    return m * EPS


def warn_if_unsolved(problem: str, residual: float, limit: float = UNSOLVED) -> None:
    """Emit an :class:`~jdcore.errors.UnsolvedWarning` if the residual exceeds the limit."""
    if residual > limit:
        warn(UnsolvedWarning(problem, residual))
