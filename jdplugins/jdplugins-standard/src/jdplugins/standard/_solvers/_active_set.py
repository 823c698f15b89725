from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jdcore.linalg import EPS, definite_solver, product

Floats = NDArray[np.float64]

# The matrix is definite by this much, so that one set of positive entries is right. What the term
# changes is corrected by moving its centre.
_PROXIMAL, _CENTRES = 1e-12, 12
_ENOUGH = 1e-13  # residual of a solution, or less where rounding allows it
# Of the entries that are negative, those are taken in that are so by this part of the worst.
_PART = 0.1
_ROUNDING = 1e-11  # residual up to which what does not halve it is taken for rounding
# Entries up to which a factorisation takes no longer than to do without one entry, and how many are
# done without before another factorisation.
_SMALL, _COLUMNS = 96, 8
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
            solve = definite_solver(block_of(self._A, indices))
            here, there, staying = _towards(solve, here, solve(b[indices]))
            indices, here = indices[staying], here[staying]
            if there is not None:
                break
        z, passive = np.zeros_like(z), np.zeros_like(passive)
        z[indices], passive[indices] = there[staying], True
        return z, passive


def block_of(C: Floats, indices: NDArray[np.intp]) -> Floats:
    """The block [k, k] of a matrix at some indices [k], which may be written to."""
    # In two steps, the first of which copies more than is wanted, in less than half of the time.
    block: Floats = C.take(indices, 0).take(indices, 1)
    return block


def _towards(
    solve: Callable[[Floats], Floats], here: Floats, there: Floats
) -> tuple[Floats, Floats | None, NDArray[np.bool_]]:
    """
    Go towards a minimum until no entry of it is negative, without those that get to zero.

    The minimum without an entry is what is left of it when so much of a column of the inverse is
    taken away that the entry is zero. The next column is that of the inverse without the entry,
    which is found in the same way.

    :param solve: Solves with the matrix.
    :param here: Where to begin [k], >= 0.
    :param there: The minimum [k].
    :returns: Where that ends [k]; the minimum without the entries that got to zero, which is None
        where a new factorisation is better than more columns; and which entries have stayed.
    """
    staying = np.ones(len(here), np.bool_)
    columns: list[tuple[int, Floats]] = []
    most = _COLUMNS if len(here) > _SMALL else 0
    while (low := there < 0.0).any():
        steps = np.full(len(here), np.inf)
        steps[low] = here[low] / (here[low] - there[low])
        leaving = (steps <= steps.min()).nonzero()[0]
        here = here + steps.min() * (there - here)
        staying[leaving] = False
        if len(columns) + len(leaving) > most:
            return here, None, staying
        for j in leaving.tolist():
            column = np.zeros_like(here)
            column[j] = 1.0
            column = solve(column)
            for i, other in columns:
                column -= (column[i] / other[i]) * other
            if not column[j] > 0.0:  # as it is but for rounding
                return here, None, staying
            there = there - (there[j] / column[j]) * column
            columns.append((j, column))
        here[~staying] = there[~staying] = 0.0
    return here, there, staying
