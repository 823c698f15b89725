"""
One right-hand side, in numpy, whose calls take half as long as torch's.

Block pivoting as in :func:`jdcore.linalg.pivot`, from the set that gradient steps suggest. What
cycles or is singular is left to the method that always ends, which begins where pivots lead with a
proximal term that falls.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jdcore.linalg import EPS, one_thread, product, solve_definite
from jdplugins.standard._solvers._active_set import WORK, ActiveSet, block_of
from jdplugins.standard._solvers._guess import descend

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Exchanges, of which some may fail to reduce the number of wrong entries; the part of entries that
# are wrong from which on zero is a better start for what comes after them; and that of rows which
# are positive throughout where many matter.
_ROUNDS, _CREDIT, _FAR, _MANY = 12, 2, 0.125, 0.28
# Proximal terms: the first and the last one, how they fall, and what part of z may still change.
_FIRST, _LAST, _FALL, _SETTLED = 0.03, 1e-8, 30.0, 0.2
EXACT = 1e-13
"""Residual of a solution."""

_NEAR = 1e-9  # residual of what is a solution but for rounding

THREADS = 256
"""Rows up to which several threads would wait for each other longer than they work."""

LARGE = 1e3
"""Entries of z that may come from rounding."""


def solve_one(C: Floats, q: Floats, passive: Mask | None = None) -> tuple[Floats, float]:
    """
    Solve one linear complementarity problem.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param q: Vector [m].
    :param passive: Where z is positive, if that is known roughly. Not modified.
    :returns: z >= 0 [m] and its natural residual.
    """
    if passive is None:
        passive = descend(C, q, np.zeros_like(q)) > 0.0
    start, found, residual = _pivoted(C, q, passive)
    if residual <= EXACT:
        return start, residual
    with one_thread(len(q) <= THREADS):
        # If few rows matter, not many steps lead from there to the solution; nor do they from the
        # minimum over a set that is near it.
        many = residual == math.inf and np.count_nonzero(found) > _MANY * len(q)
        if many and not (
            start.any() and np.abs((product(C, start) + q)[start > 0.0]).max() <= _NEAR
        ):
            start = _approached(C, q, passive)
        return ActiveSet(C, WORK).solve(q, start)


def _approached(C: Floats, q: Floats, passive: Mask) -> Floats:
    """
    About where the solution of :func:`solve_one` is, z >= 0.

    With a proximal term around the one before, as long as that changes anything and is solved.
    """
    shifted, diagonal, near, delta = C.copy(), C.diagonal(), np.zeros_like(q), _FIRST
    while delta >= _LAST:
        np.fill_diagonal(shifted, diagonal + delta)
        z, found, residual = _pivoted(shifted, q - delta * near, passive)
        if residual == math.inf:
            break
        moved, near, passive = float(np.abs(z - near).max()), z, found
        if moved <= _SETTLED * z.max():
            break
        delta /= _FALL
    return near


def _pivoted(C: Floats, q: Floats, passive: Mask) -> tuple[Floats, Mask, float]:
    """
    :func:`solve_one` by block pivoting.

    :returns: z, the set where it is positive, and its residual. Where that cycles: the z >= 0 that
        was nearest, the smallest set that was met, and infinity.
    """
    m = len(q)
    tolerance, fewest, failures = 16.0 * m * EPS, m + 1, 0
    nearest, least = np.zeros(m), passive
    for _ in range(_ROUNDS):
        indices = passive.nonzero()[0]
        z = np.zeros(m)
        try:
            z[indices] = solve_definite(block_of(C, indices), -q[indices])
        except np.linalg.LinAlgError:
            least = np.zeros(m, np.bool_)
            break
        y = product(C, z)
        y += q
        largest = float(z.max())
        wrong = np.where(passive, z, y + tolerance * (1.0 + largest)) < 0.0
        count = int(np.count_nonzero(wrong))
        if not count:
            residual = float(np.abs(np.minimum(z, y)).max()) / (1.0 + largest)
            if residual > _NEAR or largest > LARGE:
                break
            return z, passive, residual
        # Beside what comes from a singular block, no residual would be seen.
        if count < fewest and largest <= LARGE:
            fewest, nearest = count, np.maximum(z, 0.0)
        else:
            failures += 1
            if failures == _CREDIT:
                break
        if largest > LARGE:  # as of rows that are nearly equal: what is negative is one of them
            passive = passive & ~wrong
        else:
            passive = passive ^ wrong
            least = min(least, passive, key=np.count_nonzero)
    return nearest if fewest < _FAR * m else np.zeros(m), least, math.inf
