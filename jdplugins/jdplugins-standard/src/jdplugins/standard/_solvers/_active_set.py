from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jdcore.linalg import EPS, factorize, product, solve

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Factorised is C with one of these added to its diagonal: the first one that leaves it definite.
_PROXIMAL = (1e-12, 1e-10)
_ENOUGH = 1e-14  # residual of a solution, or less where rounding allows it
# Of the entries that are negative, those are taken in that are so by this part of the worst.
_PART = 0.1
_CLEAR = 10.0  # times the rounding of a gradient: what is not rounding
# Residuals up to which what does not halve them is taken for rounding: of a factor that changed,
# and of a new one.
_FINE, _ROUNDING = 1e-13, 1e-11
_STALLED = 8  # steps that do not halve it one after the other, at most, above that
_SMALL = 96  # entries of a set that is factorised anew for each of them that leaves or joins
# Entries by which a set may differ from the one that is factorised: a number, and one more for so
# many entries of that.
_CHANGES, _PER_CHANGE = 8, 6
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
    wherever it begins, with the exact solution.

    Steps are those of Newton's method for C with a proximal term, from where z is: what the term
    and rounding leave of the gradient is corrected by the next one.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one.
    :param work: Multiplications that it may take for all problems together.
    """

    def __init__(self, C: Floats, work: float) -> None:
        self._C, self.work = C, work

    def solve(self, q: Floats, start: Floats) -> tuple[Floats, float]:
        """
        Solve one problem.

        :param q: Vector q [m].
        :param start: Where to begin, z >= 0 [m], the nearer the better. Not modified.
        :returns: z >= 0 [m], and its natural residual.
        """
        m, z, y = len(q), start, product(self._C, start) + q
        residual = least = _residual(z, y)
        best = start
        enough, tolerance = min(_ENOUGH, m * EPS), 16.0 * m * EPS
        passive, stalled = z > 0.0, 0
        factor: _Block | _Factor | None = None
        for _ in range(_TIMES * m):
            if least <= enough or self.work <= 0.0:
                break
            try:
                z, factor = self._descended(z, y, passive, factor)
            except np.linalg.LinAlgError:  # where C is not semi-definite
                break
            y = product(self._C, z) + q
            before, residual = residual, _residual(z, y)
            if residual < least:
                best, least = z, residual
            worst = float(y.min())
            wrong = (y <= _PART * worst) & ~passive
            # What is positive has a y of rounding, beside which that of others tells nothing.
            rounding = _CLEAR * float(np.abs(y[passive]).max(initial=0.0))
            if wrong.any() and -worst > max(rounding, tolerance * (1.0 + float(z.max()))):
                passive |= wrong
                factor.exchange(wrong.nonzero()[0])
                stalled = 0
            elif residual > 0.5 * before:
                stalled += 1
                limit = _FINE if factor.is_changed else _ROUNDING
                if residual < limit or stalled > _STALLED:
                    break
                factor = None
        return best, least

    def _descended(
        self, z: Floats, y: Floats, passive: Mask, factor: _Block | _Factor | None
    ) -> tuple[Floats, _Block | _Factor]:
        """
        The minimum over a set without the entries that would be negative, which leave it.

        :param z: Where to begin.
        :param y: The gradient there.
        :param passive: The set. Modified.
        :param factor: What solves with the matrix on it; None if that is to be made.
        """
        remaining = 1.0  # part of the gradient
        z = z.copy()
        while True:
            if factor is None or factor.is_worn:
                small = np.count_nonzero(passive) <= _SMALL
                factor = (_Block if small else _Factor)(self._C, passive)
                self.work -= factor.size**3 / 6.0
            self.work -= factor.size**2
            step = factor.solve(y)
            step *= -remaining
            there = z + step
            low = (there < 0.0).nonzero()[0]
            if not low.size:
                return there, factor
            lengths = z[low] / -step[low]
            length = float(lengths.min())
            leaving = low[lengths <= length]
            z += length * step
            z[leaving] = 0.0
            remaining *= 1.0 - length
            passive[leaving] = False
            factor.exchange(leaving)


def _residual(z: Floats, y: Floats) -> float:
    return float(np.abs(np.minimum(z, y)).max() / (1.0 + z.max()))


class _Block:
    """
    :class:`_Factor` of a set so small that to make it anew takes less time than to change it.

    :param C: Positive semi-definite matrix [m, m].
    :param passive: The set, bool [m].
    """

    is_worn, is_changed = True, False

    def __init__(self, C: Floats, passive: Mask) -> None:
        self._indices = passive.nonzero()[0]
        self.size = len(self._indices)
        self._block = block_of(C, self._indices)
        self._block.reshape(-1)[:: self.size + 1] += _PROXIMAL[0]

    def exchange(self, entries: NDArray[np.intp]) -> None:
        """Nothing, as it is worn."""

    def solve(self, b: Floats) -> Floats:
        """The x with ``C_FF x = b_F`` on the set F, and zero elsewhere [m]."""
        x = np.zeros(len(b))
        x[self._indices] = solve(self._block, b[self._indices])
        return x


class _Factor:
    """
    Solves with the block of C, and a proximal term, at a set of indices that changes.

    The block at the set in the beginning is factorised. For each entry that has left or joined
    since, it is bordered by a row and column: a unit vector, so that the entry is zero, or what
    belongs to the entry in C. What the border adds to the factor are the columns W of ``L⁻¹ V``
    for the columns V, and the Schur complement ``D - Wᵀ W`` of what it has in its corner.

    :param C: Positive semi-definite matrix [m, m].
    :param passive: The set, bool [m].
    :raises numpy.linalg.LinAlgError: If the block is not semi-definite.
    """

    def __init__(self, C: Floats, passive: Mask) -> None:
        self._C = C
        self._indices = indices = passive.nonzero()[0]
        self.size = len(indices)
        self._places = np.full(len(C), -1)
        self._places[indices] = np.arange(self.size)
        block = torch.from_numpy(block_of(C, indices))
        for self._shift in _PROXIMAL:
            block.diagonal().add_(self._shift)
            self._L, failed = factorize(block)
            if not failed.item():
                break
        else:
            raise np.linalg.LinAlgError("The block is not positive semi-definite.")
        self._changed, self._slots = indices[:0], np.full(len(C), -1)
        self._W = np.empty((0, self.size))
        self._complement = np.empty((0, 0))

    @property
    def is_worn(self) -> bool:
        """Whether another factorisation takes less than to go on with this one."""
        return len(self._changed) > _CHANGES + self.size // _PER_CHANGE

    @property
    def is_changed(self) -> bool:
        """Whether the set is another one than that which was factorised."""
        return bool(self._changed.size)

    def exchange(self, entries: NDArray[np.intp]) -> None:
        """Let those of some entries leave that are in the set, and the others join."""
        again = self._slots[entries]
        if again.max() >= 0:
            entries = entries[again < 0]
            kept = np.ones(len(self._changed), np.bool_)
            kept[again[again >= 0]] = False
            self._changed, self._W = self._changed[kept], self._W[kept]
            self._complement = self._complement[kept][:, kept]
            self._slots.fill(-1)
            self._slots[self._changed] = np.arange(len(self._changed))
            if not entries.size:
                return
        k, places = len(self._changed), self._places[entries]
        left = (places >= 0).nonzero()[0]
        columns = self._C[entries].take(self._indices, 1)
        columns[left] = 0.0
        columns[left, places[left]] = 1.0
        changed = np.concatenate((self._changed, entries))
        self._slots[entries] = np.arange(k, len(changed))
        W = self._triangular(columns.T, upper=False).T
        corner = self._C[changed[:, None], entries]
        corner[k:].flat[:: len(entries) + 1] += self._shift
        corner[self._places[changed] >= 0] = 0.0
        corner[:, left] = 0.0
        self._changed, self._W = changed, np.concatenate((self._W, W))
        corner -= self._W.dot(W.T)
        complement = np.empty((len(changed), len(changed)))
        complement[:k, :k] = self._complement
        complement[:, k:], complement[k:, :k] = corner, corner[:k].T
        self._complement = complement

    def solve(self, b: Floats) -> Floats:
        """The x with ``C_FF x = b_F`` on the set F, and zero elsewhere [m]."""
        x, changed = np.zeros(len(b)), self._changed
        rest = self._triangular(b[self._indices][:, None], upper=False)[:, 0]
        if changed.size:
            joined = self._places[changed] < 0
            y = np.linalg.solve(self._complement, b[changed] * joined - self._W @ rest)
            rest = rest - y @ self._W
        x[self._indices] = self._triangular(rest[:, None], upper=True)[:, 0]
        if changed.size:
            x[changed] = y * joined
        return x

    def _triangular(self, columns: Floats, upper: bool) -> Any:
        """``L⁻¹ B`` or ``L⁻ᵀ B``."""
        L = self._L.mT if upper else self._L
        return torch.linalg.solve_triangular(L, torch.from_numpy(columns), upper=upper).numpy()


def block_of(C: Floats, indices: NDArray[np.intp]) -> Floats:
    """The block [k, k] of a matrix at some indices [k], which may be written to."""
    # In two steps, the first of which copies more than is wanted, in less than half of the time.
    block: Floats = C.take(indices, 0).take(indices, 1)
    return block
