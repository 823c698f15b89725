"""
One right-hand side, in numpy, whose calls take half as long as torch's.

Block pivoting as in :func:`jdcore.linalg.pivot`, from the set that gradient steps suggest, as far
as it gets without a proximal term. What cycles or is singular is left to the method that always
ends.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jdcore.linalg import EPS, one_thread, product, solve_definite
from jdplugins.standard._solvers._active_set import WORK, ActiveSet, block_of
from jdplugins.standard._solvers._guess import descend

Floats = NDArray[np.float64]

# Exchanges, of which some may fail to reduce the number of wrong entries; and the part of entries
# that are wrong from which on zero is a better start for what comes after them.
_ROUNDS, _CREDIT, _FAR = 12, 3, 0.125
EXACT = 1e-13
"""Residual of a solution."""

_NEAR = 1e-9  # residual of what is a solution but for rounding

THREADS = 256
"""Rows up to which several threads would wait for each other longer than they work."""

LARGE = 1e3
"""Entries of z that may come from rounding."""


def solve_one(
    C: Floats, q: Floats, passive: NDArray[np.bool_] | None = None
) -> tuple[Floats, float]:
    """
    Solve one linear complementarity problem.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param q: Vector [m].
    :param passive: Where z is positive, if that is known roughly. Not modified.
    :returns: z >= 0 [m] and its natural residual.
    """
    start, residual = _pivoted(C, q, passive)
    if residual <= EXACT:
        return start, residual
    with one_thread(len(q) <= THREADS):
        return ActiveSet(C, WORK).solve(q, start)


def _pivoted(C: Floats, q: Floats, passive: NDArray[np.bool_] | None) -> tuple[Floats, float]:
    """
    :func:`solve_one` by block pivoting.

    :returns: z and its residual. Where that cycles: infinity, and the z >= 0 that was nearest.
    """
    m = len(q)
    tolerance, fewest, failures, nearest = 16.0 * m * EPS, m + 1, 0, np.zeros(m)
    start = descend(C, q, nearest) > 0.0 if passive is None else passive
    for _ in range(_ROUNDS):
        indices = start.nonzero()[0]
        z = np.zeros(m)
        try:
            z[indices] = solve_definite(block_of(C, indices), -q[indices])
        except np.linalg.LinAlgError:
            break
        y = product(C, z)
        y += q
        largest = float(z.max())
        wrong = np.where(start, z, y + tolerance * (1.0 + largest)) < 0.0
        count = int(np.count_nonzero(wrong))
        if not count:
            residual = float(np.abs(np.minimum(z, y)).max()) / (1.0 + largest)
            if residual > _NEAR or largest > LARGE:
                break
            return z, residual
        # Beside what comes from a singular block, no residual would be seen.
        if count < fewest and largest <= LARGE:
            fewest, nearest = count, np.maximum(z, 0.0)
        else:
            failures += 1
            if failures == _CREDIT:
                break
        start = start ^ wrong
    return nearest if fewest < _FAR * m else np.zeros(m), math.inf
