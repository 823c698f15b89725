from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jdcore.linalg import EPS, product, solve_definite

Floats = NDArray[np.float64]

# The matrix is definite by this much, so that one set of positive entries is right. What the term
# changes is corrected by moving its centre.
_PROXIMAL, _CENTRES = 1e-12, 12
_ENOUGH = 1e-13  # residual of a solution, or less where rounding allows it
# Of the entries that are negative, those are taken in that are so by this part of the worst.
_PART = 0.1
_ROUNDING = 1e-11  # residual up to which what does not halve it is taken for rounding
_TIMES = 8  # the number of entries: times that entries join, at most, should rounding decide

WORK = 1e11
"""Multiplications that rows may take that are solved one by one: some 30 seconds of a CPU."""


class ActiveSet:
    """
    The primal active-set method for one linear complementarity problem after the other, in numpy.

    The problem is to minimise ``zᵀ C z / 2 + qᵀ z`` over z >= 0. On the way to the minimum with
    the entries of a set that are positive, z goes as far as none of them gets negative, and those
    that are zero then leave the set. Where all stay positive, entries whose gradient y is negative
    join. Each step lowers the objective, so it ends, however the rows depend on each other and
    wherever it begins, with the exact solution. It takes about as many factorisations as entries
    are wrong at the beginning.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param work: Multiplications that it may take for all problems together.
    """

    def __init__(self, C: Floats, work: float) -> None:
        self._C, self.work = C, work
        self._A = C.copy()
        self._A.reshape(-1)[:: len(C) + 1] += _PROXIMAL

    def solve(self, q: Floats, start: Floats) -> tuple[Floats, float]:
        """
        Solve one problem.

        :param q: Vector q [m].
        :param start: Where to begin, z >= 0 [m], the nearer the better. Not modified.
        :returns: z >= 0 [m], and its natural residual.
        """
        best, least = start, self._residual(q, start)
        z, enough = start, min(_ENOUGH, 6.0 * len(q) * EPS)
        for _ in range(_CENTRES):
            if least <= enough or self.work <= 0.0:
                break
            try:
                z = self._minimised(_PROXIMAL * z - q, z)
            except np.linalg.LinAlgError:  # where C is not semi-definite
                break
            before, residual = least, self._residual(q, z)
            if residual < least:
                best, least = z, residual
            if 0.5 * before < residual < _ROUNDING:
                break
        return best, least

    def _residual(self, q: Floats, z: Floats) -> float:
        return float(np.abs(np.minimum(z, product(self._C, z) + q)).max() / (1.0 + z.max()))

    def _minimised(self, b: Floats, z: Floats) -> Floats:
        """The minimum of ``zᵀ A z / 2 - bᵀ z``, or as near to that as the work allows."""
        passive = z > 0.0
        tolerance = 16.0 * len(b) * EPS
        for _ in range(_TIMES * len(b)):
            z, passive = self._descended(b, z, passive)
            y = product(self._A, z) - b
            least = float(y.min())
            # What is positive has a y of rounding.
            wrong = (y <= _PART * least) & ~passive
            done = least >= -tolerance * (1.0 + float(z.max())) or not wrong.any()
            if done or self.work <= 0.0:
                break
            passive |= wrong
        return z

    def _descended(
        self, b: Floats, z: Floats, passive: NDArray[np.bool_]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """The minimum over a set from which the entries are gone that would be negative."""
        indices = passive.nonzero()[0]
        here = z[indices]
        while True:
            self.work -= len(indices) ** 3 / 6.0
            there = solve_definite(self._A.take(indices, 0).take(indices, 1), b[indices])
            low = there < 0.0
            if not low.any():
                break
            steps = np.full(len(here), np.inf)
            steps[low] = here[low] / (here[low] - there[low])
            staying = steps > steps.min()
            here = (here + steps.min() * (there - here))[staying]
            indices = indices[staying]
        z, passive = np.zeros_like(z), np.zeros_like(passive)
        z[indices], passive[indices] = there, True
        return z, passive
