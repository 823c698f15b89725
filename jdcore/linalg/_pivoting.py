"""
Block principal pivoting: the one loop that finds which entries of a solution are positive.

For a linear complementarity problem (LCP), find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``.
If F is the set of positive entries, ``C_FF z_F = -q_F`` gives their values; where these or the y
outside F are negative, F is wrong there, and is exchanged (Júdice and Pires). All right-hand sides
go together. Everything is a Tensor, on any device.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from jdcore.linalg._blas import one_thread

EPS = 2.0**-52
# Up to this size, gathering the block of a set costs more than it saves, and numpy less than torch.
_SMALL = 32
# Rounds of small problems in which all rows go on: telling them apart would take longer.
_TOGETHER = 6
_CREDIT = 4  # block exchanges that may fail to reduce the number of wrong entries
_REFINEMENTS = 2
_SLIGHT = 1e-8  # an entry of z that is negative by so little is zero in the solution
# Entries of the blocks that are factorised at once: caches of CPUs are small, and an accelerator
# wants few calls.
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 18, 1 << 26


def natural_residual(C: Tensor, Q: Tensor, Z: Tensor) -> Tensor:
    """``max |min(z, C z + q)|`` relative to ``1 + max z`` for every row, [k]; 0 if solved."""
    violations = torch.minimum(Z, torch.addmm(Q, Z, C)).abs_()
    return violations.amax(1) / (1.0 + Z.amax(1))


def pivot(
    C: Tensor,
    Q: Tensor,
    passive: Tensor,
    *,
    delta: float = 0.0,
    centre: Tensor | None = None,
    rounds: int = 30,
) -> Tensor:
    """
    Solve the LCPs of C and the rows of Q, as far as exchanges find the positive entries.

    With a proximal term, the sets are those of ``C + delta I`` and ``q - delta centre``, which is
    well-posed even where C is singular; steps of refinement then lead towards the solution without.

    :param C: Positive semi-definite matrix [m, m] with a diagonal of order one, float64.
    :param Q: Vectors q, one problem per row [k, m], float64.
    :param passive: Where z is thought to be positive, bool [k, m]. Replaced by the sets found.
    :param delta: The proximal term. 0 where C is safely positive definite.
    :param centre: Where z is thought to be [k, m]; None for zero.
    :param rounds: Number of factorisations of a set, at most.
    :returns: z >= 0 [k, m]. Only its residual tells whether it is the solution.
    """
    k, m = Q.shape
    b = -Q if centre is None else torch.sub(centre * delta, Q)
    if m <= _SMALL and C.is_cpu and rounds >= _TOGETHER:
        try:
            together = _exchange_together(C, Q, b, passive, delta)
        except np.linalg.LinAlgError:
            together = None
        if together is not None:
            return together
    sets = PassiveSets(C, delta)
    Z = torch.zeros_like(Q)
    rows = torch.arange(k, device=Q.device)
    fewest = torch.full_like(rows, m + 1)
    credit = torch.full_like(rows, _CREDIT)
    for _ in range(rounds):
        f, rhs = passive[rows], b[rows]
        factors = sets.factors(f)
        z = factors.solve(rhs)
        y = torch.addmm(rhs, z, C, beta=-1.0)
        y += _tolerance(m) * (1.0 + z.abs().amax(1, keepdim=True))
        wrong = torch.where(f, z, y) < 0.0
        count = wrong.sum(1)
        going = count.nonzero()[:, 0]
        if delta and len(going) < len(rows):
            z = _refined(C, Q[rows], z, factors)
        Z[rows] = z
        if not len(going):
            break
        rows, wrong, count = rows[going], wrong[going], count[going]
        fewer = count < fewest[rows]
        fewest[rows] = torch.minimum(count, fewest[rows])
        credit[rows] = torch.where(fewer, _CREDIT, credit[rows] - 1)
        passive[rows] ^= wrong
        rows = rows[credit[rows] >= 0]
        if not len(rows):
            break
    return Z.clamp_min_(0.0)


def _tolerance(m: int) -> float:
    """Entries of y above minus this (times ``1 + max z``) count as non-negative."""
    return 16.0 * m * EPS


def _exchange_together(
    C: Tensor, Q: Tensor, b: Tensor, passive: Tensor, delta: float
) -> Tensor | None:
    """
    :func:`pivot` of small problems, in numpy, whose calls take half as long as those of torch.

    All rows go on until the last is done. None if that takes too many exchanges.

    :raises numpy.linalg.LinAlgError: If a block is singular.
    """
    c, q, rhs, sets = C.numpy(), Q.numpy(), b.numpy(), passive.numpy()
    diagonal, own = np.arange(len(c)), c.diagonal() + delta
    for _ in range(_TOGETHER):
        A = c * sets[:, :, None]
        A *= sets[:, None, :]
        A[:, diagonal, diagonal] = np.where(sets, own, 1.0)
        z = np.linalg.solve(A, (rhs * sets)[:, :, None])[:, :, 0]
        y = z.dot(c)
        y -= rhs
        y += _tolerance(len(c)) * (1.0 + np.abs(z).max(axis=1, keepdims=True))
        wrong = np.where(sets, z, y) < 0.0
        if not wrong.any():
            for _ in range(_REFINEMENTS if delta else 0):
                new = z - np.linalg.solve(A, ((z.dot(c) + q) * sets)[:, :, None])[:, :, 0]
                z = np.where(new.min(axis=1, keepdims=True) < -_SLIGHT, z, new)
            return torch.from_numpy(np.maximum(z, 0.0))
        sets ^= wrong
    return None


def _refined(C: Tensor, Q: Tensor, z: Tensor, factors: Factors) -> Tensor:
    """Steps towards the solution without the proximal term, as far as no sign would change much."""
    for _ in range(_REFINEMENTS):
        new = z - factors.solve(torch.addmm(Q, z, C))
        z = torch.where(new.amin(1, keepdim=True) < -_SLIGHT, z, new)
    return z


class Factors:
    """What solves with ``C + delta I`` on one index set per row."""

    def solve(self, b: Tensor) -> Tensor:
        """Rows z with ``(C_FF + delta I) z_F = b_F``, and zero elsewhere."""
        raise NotImplementedError


class PassiveSets:
    """Makes the factors of ``C + delta I`` on any sets of indices."""

    def __init__(self, C: Tensor, delta: float) -> None:
        self._C, self._delta = C, delta
        self._shifted: Tensor | None = None
        self._inverse: Tensor | None = None

    def factors(self, passive: Tensor) -> Factors:
        """Factors on index sets F, bool [k, m]."""
        with one_thread(self._C.is_cpu):
            if len(passive) == 1:
                return _Single(self._C, self._delta, passive[0])
            many = passive.sum(1) * 2 > len(self._C)
            # Where most indices are in, their complement is factorised instead.
            large, small = many.nonzero()[:, 0], (~many).nonzero()[:, 0]
            parts: list[tuple[Tensor, Factors]] = []
            if len(small):
                shifted = self._padded(inverse=False)
                parts.append((small, _Gathered(shifted, passive[small])))
            if len(large):
                inverse = self._padded(inverse=True)
                parts.append((large, _Complement(inverse, passive[large])))
        return parts[0][1] if len(parts) == 1 else _Parts(parts)

    def _padded(self, *, inverse: bool) -> Tensor:
        """The matrix or its inverse, with one more row and column of zeros."""
        if self._shifted is None:
            self._shifted = torch.nn.functional.pad(self._C, (0, 1, 0, 1))
            self._shifted.diagonal()[:-1].add_(self._delta)
        if not inverse:
            return self._shifted
        if self._inverse is None:
            factor = torch.linalg.cholesky_ex(self._shifted[:-1, :-1])[0]
            unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            # Unlike an inversion, this does not raise where the factor has a zero: it gives NaN.
            inverse_matrix = torch.cholesky_solve(unit, factor)
            self._inverse = torch.nn.functional.pad(inverse_matrix, (0, 1, 0, 1))
        return self._inverse


class _Single(Factors):
    """The factor of one set."""

    def __init__(self, C: Tensor, delta: float, passive: Tensor) -> None:
        self._indices = passive.nonzero()[:, 0]
        whole = len(self._indices) == len(C)
        block = C.clone() if whole else C[self._indices[:, None], self._indices]
        block.diagonal().add_(delta)
        self._factor = torch.linalg.cholesky_ex(block)[0]

    def solve(self, b: Tensor) -> Tensor:
        z = torch.zeros_like(b)
        z[0, self._indices] = torch.cholesky_solve(b[0, self._indices, None], self._factor)[:, 0]
        return z


@frozen
class _Parts(Factors):
    """Some rows here, some there."""

    parts: list[tuple[Tensor, Factors]]

    def solve(self, b: Tensor) -> Tensor:
        z = torch.empty_like(b)
        for rows, factors in self.parts:
            z[rows] = factors.solve(b[rows])
        return z


class _Gathered(Factors):
    """
    Factors of the blocks alone, in batches of sets of like size.

    :param M: Matrix with one more row and column of zeros, which pad the shorter sets of a batch.
    """

    def __init__(self, M: Tensor, sets: Tensor) -> None:
        m = sets.shape[1]
        self._m, self._batches = m, []
        ascending, order = sets.sum(1).sort()
        rows, columns = sets.nonzero(as_tuple=True)
        sizes = ascending.tolist()
        index = torch.full((len(sets), max(sizes, default=0)), m, device=M.device)
        index[rows, sets.cumsum(1)[rows, columns] - 1] = columns
        entries = _ENTRIES if M.is_cpu else _ENTRIES_ELSEWHERE
        end = len(sizes)
        while end and sizes[end - 1]:
            size = sizes[end - 1]
            start = max(0, end - max(1, entries // (size * size)))
            batch = order[start:end]
            self._batches.append((batch, *_factorised(M, index[batch, :size])))
            end = start

    def solve(self, b: Tensor) -> Tensor:
        z = b.new_zeros((len(b), self._m + 1))
        padded = torch.nn.functional.pad(b, (0, 1))
        with one_thread(b.is_cpu):
            for batch, index, factor in self._batches:
                x = torch.cholesky_solve(padded[batch].gather(1, index)[:, :, None], factor)
                z[batch] = z[batch].scatter_(1, index, x[:, :, 0])
        return z[:, :-1]


def _factorised(M: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the blocks of M at some indices, and these."""
    m, size = len(M), index.shape[1]
    entries = (index[:, :, None] * m + index[:, None, :]).view(-1)
    A = M.view(-1).index_select(0, entries).view(-1, size, size)
    A.diagonal(dim1=1, dim2=2).add_(index == m - 1)
    return index, torch.linalg.cholesky_ex(A)[0]


class _Complement(Factors):
    """
    Solves on sets F by factors on their complements: those of the inverse P of the matrix.

    The z of ``P b`` that is zero outside of F is ``P b - P_A (P_AA)⁻¹ (P b)_A``.
    """

    def __init__(self, P: Tensor, passive: Tensor) -> None:
        self._P, self._passive = P[:-1, :-1], passive
        self._outside = _Gathered(P, ~passive)

    def solve(self, b: Tensor) -> Tensor:
        z = (b * self._passive) @ self._P
        return z.addmm_(self._outside.solve(z), self._P, alpha=-1.0).mul_(self._passive)
