"""
Parametric principal pivoting: one entry at a time becomes positive or zero.

With ``q + t`` in place of q, z = 0 solves a linear complementarity problem once t is large. As t
falls to zero, entries of z and y change along straight lines, and where one gets to zero, it takes
the place of its partner: a principal pivot, which never has to choose (Cottle, Pang and Stone, "The
Linear Complementarity Problem", section 4.5). So it ends, however the rows depend on each other. A
pivot changes all entries of a tableau by a product of two vectors, and those of all right-hand
sides are made by the same few calls.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from jdcore.linalg import EPS, lcp_residual, one_thread, product
from jdplugins.standard._solvers._active_set import WORK

Floats = NDArray[np.float64]

# The matrix is definite by this much, so that one set of positive entries is right, and no pivot is
# zero. What the term changes is corrected by moving its centre.
_PROXIMAL, _CENTRES = 1e-12, 8
_TIMES = 4  # the number of entries: pivots, at most, should rounding decide
_ENTRIES = 1 << 22  # of the tableaus that are made at once


def follow(C: Floats, Q: Floats) -> tuple[Floats, Floats]:
    """
    Solve linear complementarity problems.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param Q: Vectors q, one problem per row [k, m].
    :returns: z >= 0 [k, m], and their natural residuals [k], of which those are large that would
        take too long.
    """
    k, m = Q.shape
    Z, residuals = np.zeros_like(Q), np.full(k, np.inf)
    count, work = max(1, _ENTRIES // (m * m)), WORK
    # Numbers overflow where C is not semi-definite.
    with one_thread(), np.errstate(all="ignore"):
        for start in range(0, k, count):
            rows = slice(start, start + count)
            paths = _Paths(C, Q[rows], Z[rows], residuals[rows])
            work = paths.run(work)
    return Z, residuals


class _Paths:
    """
    The tableaus of some problems, and what is known of their solutions.

    :param Z: Best answers so far [k, m]. Modified.
    :param residuals: Those of these answers [k]. Modified.
    """

    # For the set F of positive entries of a row and A, the matrix with the proximal term, its
    # tableau is transposed: that of A with rows and columns of F exchanged, then the values of z in
    # F and y elsewhere, then how these change with t.

    def __init__(self, C: Floats, Q: Floats, Z: Floats, residuals: Floats) -> None:
        k, m = Q.shape
        self.C, self.Q, self.Z, self.residuals = C, Q, Z, residuals
        self.tableaus = np.empty((k, m + 2, m))
        self.tableaus[:, :m] = C
        self.tableaus.reshape(k, -1)[:, : m * m : m + 1] += _PROXIMAL
        self.tableaus[:, m] = Q
        self.positive = np.zeros((k, m), dtype=np.bool_)
        self.order = np.arange(k)
        self.tolerance = 16.0 * m * EPS

    def run(self, work: float) -> float:
        """Solve as far as the work allows, and return what is left of that."""
        m = self.Q.shape[1]
        for _ in range(_CENTRES):
            self.tableaus[:, m + 1] = 1.0
            work -= m * m * self._pivot(min(_TIMES * m, int(work / self.tableaus.size)))
            z = np.where(self.positive, self.tableaus[:, m], 0.0)
            near = self._corrected(z)
            before = self.residuals[self.order]
            self._keep(near)
            residuals = self.residuals[self.order]
            # Where z is large, what is small beside it still leaves an error in ``Jᵀ z``.
            going = (residuals > 2.0 * m * EPS) & (residuals < 0.5 * before)
            going |= residuals > self.tolerance
            if work <= 0.0 or not going.any():
                break
            # Where z is now becomes the centre.
            self.order, self.positive = self.order[going], self.positive[going]
            self.tableaus, z, near = self.tableaus[going], z[going], near[going]
            y = product(near, self.C) + self.Q[self.order] + _PROXIMAL * (near - z)
            self.tableaus[:, m] = np.where(self.positive, near, y)
        return work

    def _corrected(self, z: Floats) -> Floats:
        """A step towards the solution without the proximal term, after which signs may be wrong."""
        m = z.shape[1]
        gaps = (product(z, self.C) + self.Q[self.order]) * self.positive
        tableaus = torch.from_numpy(self.tableaus)[:, :m]
        steps: Floats = torch.bmm(tableaus, torch.from_numpy(gaps)[:, :, None]).numpy()[:, :, 0]
        return z - steps * self.positive

    def _keep(self, z: Floats) -> None:
        """Take answers where they are better than those before."""
        z = np.maximum(z, 0.0)
        residuals = lcp_residual(self.C, self.Q[self.order], z)
        better = residuals < self.residuals[self.order]
        rows = self.order[better]
        self.Z[rows], self.residuals[rows] = z[better], residuals[better]

    def _pivot(self, limit: int) -> int:
        """Follow the solutions to t = 0, and return the number of pivots."""
        k, _, m = self.tableaus.shape
        numbers, pivots = np.arange(k), 0
        tableaus, tensor, rows = self.tableaus, torch.from_numpy(self.tableaus), numbers
        for _ in range(limit):
            w = tableaus[:, m]
            times = np.where(w < -self.tolerance, w / tableaus[:, m + 1], 0.0)  # -t
            p = times.argmin(axis=1)
            going = times[rows, p] < 0.0
            left = int(np.count_nonzero(going))
            if left < k:
                self._bring_forward(going, left, p)
                k = left
                if not k:
                    break
                tableaus, tensor, rows, p = tableaus[:k], tensor[:k], numbers[:k], p[:k]
            column, row = tableaus[rows, :, p], tableaus[rows, p]
            pivot = row[rows, p]
            row /= pivot[:, None]
            # A product of these two makes the new column and row, once what was there is zero.
            column[rows, p], row[rows, p] = -1.0, 1.0 / pivot
            tableaus[rows, :, p] = 0.0
            tableaus[rows, p] = 0.0
            tensor.addcmul_(
                torch.from_numpy(column[:, :, None]), torch.from_numpy(row[:, None]), value=-1.0
            )
            self.positive[rows, p] ^= True
            pivots += k
        return pivots

    def _bring_forward(self, going: NDArray[np.bool_], left: int, p: NDArray[np.int64]) -> None:
        """Exchange rows that are done for later ones that are going, so that these come first."""
        done = np.flatnonzero(~going[:left])
        later = left + np.flatnonzero(going[left:])
        to, of = np.concatenate((done, later)), np.concatenate((later, done))
        for array in (self.tableaus, self.positive, self.order, p):
            array[to] = array[of]
