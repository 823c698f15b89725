"""
The linear complementarity problem (LCP) that the native solvers share.

Find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C [m, m] is positive semi-definite
with a diagonal of order one and q [m] is of order one. How far a z is from that tells its natural
residual, ``max |min(z, y)|`` relative to ``1 + max z``. Nothing else decides whether an answer is
accepted: all steps on the way may be as wrong as they like.
"""

from __future__ import annotations

import functools
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore.linalg import factorize, misplaced, natural_residual, one_thread, pivot
from jdplugins.standard._solvers._active_set import WORK, ActiveSet
from jdplugins.standard._solvers._alone import EXACT, THREADS, solve_one
from jdplugins.standard._solvers._faces import find_face
from jdplugins.standard._solvers._guess import GOOD, guess, guess_again
from jdplugins.standard._solvers._parametric import follow
from jdplugins.standard._solvers._unsolved import UNSOLVED

Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Matrix = TypeVar("Matrix", Floats, Tensor)

# Up to so many rows, to follow solutions takes no longer than a guess and what comes after it; and
# up to so many multiplications, than what comes after a guess that is not good enough.
_FOLLOWED, _WORTH = 32, 6e7
_FACED = 48  # rows up to which that takes less than to look for rows that cancel
# Squared pivots of C. Below the first one, some combination of rows is zero, and above the second
# one, they are as good as independent.
_SINGULAR, _FAR = 1e-10, 1e-3

# Rows up to which a few are followed in less time than others come near, and up to which exchanges
# suit rows none of which cancel.
_PIVOTED = 256
# Part of a guess up to which one wrong sign after the other takes less time than exchanges, and the
# rows above which that is so.
_CORRECTED, _LARGE = 0.05, 96
# Rows above which a guess on a scale that suits them pays, of rows none of which cancel, unless it
# is wrong by this part.
_GUESSED, _USELESS = 64, 0.1
_DAMPED = 1e-10  # proximal term with which wrong signs are counted
_SAMPLE = 4  # rows that tell which scale is right for all
_ALONE = 16  # rows that are solved one by one before another guess would be made
# Residuals: that suffices for few rows, above which an answer is handed on to the next method, and
# of answers of which only signs that are rounding are wrong.
_EXACT, ROUGH, _NEARLY = 1e-12, 1e-11, 1e-7
# Residual that the proximal term of float32 leaves of multiples of one row, half of it, and what
# their absolute cosines differ by. What other rows have beside a common one may be as small.
_MULTIPLES, _EQUAL = 2e-12, 1e-14
# Part of the signs that may still change in a guess, proximal terms to pivot with one after the
# other, and the residual that suffices. Of many solutions of rows that cancel, a proximal term
# chooses one near the guess; what differs between these is as small as the least eigenvalues, and
# so are residuals.
_Way: TypeAlias = tuple[float, tuple[float, ...], float]
_ANY: _Way = 5e-4, (0.0,), _EXACT
_CANCELLING: _Way = 5e-5, (_DAMPED, 1e-13), UNSOLVED


def solve_lcps(C: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """
    Solve the LCPs of all rows of Q.

    :param C: The matrix [m, m], float64, on any device.
    :param Q: Vectors q [k, m], float64.
    :returns: Solutions Z [k, m] and their natural residuals [k].
    """
    if len(Q) == 1:  # one row never keeps an accelerator busy
        z, residual = solve_one(C.numpy(force=True), Q[0].numpy(force=True))
        return Q.new_tensor(z[None]), Q.new_tensor([residual])
    with one_thread(C.is_cpu and len(C) <= THREADS):
        search = _Search(C, Q)
        search.run()
    return search.Z, search.residuals


class _Search:
    """
    The best answers so far, and what makes them better.

    :param C: The matrix [m, m].
    :param Q: Vectors q [k, m].
    """

    # X: guesses in float32, as of Splitting. Z: the best answers, and their residuals. near: z >= 0
    # with the lowest objective that was met, from which the active-set method begins.

    def __init__(self, C: Tensor, Q: Tensor) -> None:
        self.C, self.Q = C, Q
        self.X, self.Z = Q.neg().float(), torch.zeros_like(Q)
        self.near = self.Z.clone()
        self.residuals = Q.amin(1).neg_().clamp_min_(0.0)
        self.all = torch.arange(len(Q), device=Q.device)
        self.pivot = _smallest_pivot(C)
        self.cancelling, self.independent = self.pivot < _SINGULAR, self.pivot >= _FAR
        self.settled, self.deltas, self.enough = _CANCELLING if self.cancelling else _ANY

    def run(self) -> None:
        k, m = self.Q.shape
        enough = _EXACT
        if not self.independent:
            Z, residuals, enough = one_entry(self.C, self.Q)
            self.keep(self.all, Z, residuals)
        left = self.left(enough)
        if not len(left):
            return
        few = k * m**3 <= _WORTH and (m <= _GUESSED or self.independent or self.cancelling)
        if not few or (m > _FOLLOWED and self.independent):
            self._guess(left)
        faced = self.cancelling and (m > _FACED or not few)
        if faced:
            self._by_face()
        if few:
            self._follow(self.left(self.enough if faced else _EXACT))
        else:
            self._guess_again()
            self._one_by_one()

    def left(self, residual: float) -> Tensor:
        """The rows that are not solved yet: those of larger residuals."""
        return self.all[self.residuals > residual]

    def keep(self, rows: Tensor, Z: Tensor, residuals: Tensor) -> None:
        """Take answers to some rows where they are better than those before."""
        better = residuals < self.residuals[rows]
        self.Z[rows] = torch.where(better[:, None], Z, self.Z[rows])
        self.residuals[rows] = torch.where(better, residuals, self.residuals[rows])

    def come_nearer(self, rows: Tensor, Z: Tensor) -> None:
        """Take other z to begin from for some rows, where their objective is lower."""
        before, Q = self.near[rows], self.Q[rows]
        lower = objective(self.C, Q, Z) < objective(self.C, Q, before)
        self.near[rows] = torch.where(lower[:, None], Z, before)

    def _guess(self, rows: Tensor) -> None:
        """Guess, and pivot from there if that is close."""
        X, changing = guess(self.C, self.Q[rows], self.settled, self.pivot)
        Z = X.clamp_min(0.0)
        residuals = natural_residual(self.C, self.Q[rows], Z)
        self.keep(rows, Z, torch.where(residuals <= _EXACT, residuals, torch.inf))
        left = (residuals > _EXACT).nonzero()[:, 0]
        rows = rows[left]
        if not len(rows):
            return
        self.X[rows], self.near[rows] = X[left].float(), Z[left]
        # To look for a better scale costs less than to pivot from far.
        sure = (self.independent or self.cancelling) and not changing
        if sure or self._wrong(few := rows[_sample(rows)], self.X[few][None])[0] <= GOOD:
            self._pivot(rows, self.near[rows])

    def _by_face(self) -> None:
        """Solve what is left beside the rows that cancel, if there are any."""
        rows = self.left(self.enough)
        face = find_face(self.C) if len(rows) > _ALONE else None
        # Beside a few that cancel, others of small problems are followed in less time.
        if face is not None and (len(self.C) > _LARGE or len(face.inside) > len(face.outside)):
            if not self.near.any():
                X, _ = guess(self.C, self.Q[rows], self.settled, self.pivot)
                self.near[rows] = X.clamp_(0.0)
            Z = face.solve(self.Q[rows], self.near[rows], lambda C, Q: solve_lcps(C, Q)[0])
            self.keep(rows, Z, natural_residual(self.C, self.Q[rows], Z))
            self.come_nearer(rows, Z)
            rows = rows[self.residuals[rows] > UNSOLVED]
            if len(rows):
                self._pivot(rows, self.Z[rows])

    def _guess_again(self) -> None:
        """Guess those that are left on the scale that suits them, and pivot from there."""
        # No guess tells signs that are rounding.
        rows = self.left(_NEARLY)
        if len(rows) > _ALONE:
            sample = _sample(rows)
            wrong = functools.partial(self._wrong, rows[sample])
            most = _USELESS if len(rows) * len(self.C) ** 3 <= _WORTH else 1.0
            X, least = guess_again(self.C, self.Q[rows], self.X[rows], sample, wrong, most)
            # Not where the objective is lower alone: two rows that are nearly equal change it less
            # than rounding does, however they share.
            self.near[rows] = centre = X.nan_to_num(0.0, 0.0).clamp_min(0.0).double()
            # Of rows that cancel, some signs are small beside what exchanges of others change.
            large = _LARGE if self.cancelling else _PIVOTED
            near = least <= _CORRECTED and len(self.C) > large
            if least > most:
                self._follow(rows)
            elif not (near and self.C.is_cpu):
                self._pivot(rows, centre)

    def _wrong(self, rows: Tensor, X: Tensor) -> list[float]:
        """The parts of the signs that some guesses get wrong, [s, k, m] -> [s]."""
        centre = X.flatten(0, 1).clamp_min(0.0).double()
        Q = self.Q[rows].repeat(len(X), 1)
        # Without a proximal term, one wrong sign moves all others of rows that nearly depend.
        wrong = misplaced(self.C, Q, centre > 0.0, delta=_DAMPED, centre=centre)
        parts: list[float] = (wrong.view(len(X), -1).double().mean(1) / len(self.C)).tolist()
        return parts

    def _pivot(self, rows: Tensor, centre: Tensor) -> None:
        """Pivot from about some z, and from the answer where that is nearly right."""
        for delta in self.deltas:
            Z, residuals = pivot(self.C, self.Q[rows], centre > 0.0, delta=delta, centre=centre)
            self.keep(rows, Z, residuals)
            left = residuals > self.enough
            self.come_nearer(rows[left], Z[left])
            residuals = self.residuals[rows]
            rows = rows[(residuals > ROUGH) & (residuals < _NEARLY)]
            if not len(rows):
                break
            centre = self.Z[rows]

    def _follow(self, rows: Tensor) -> None:
        """Solve for some rows by the method that always ends, on the host."""
        if len(rows):
            C, Q = (X.numpy(force=True) for X in (self.C, self.Q[rows]))
            Z, residuals = map(torch.from_numpy, follow(C, Q))
            self.keep(rows, Z.to(self.Q), residuals.to(self.Q))

    def _one_by_one(self) -> None:
        """The same for many, where to begin near a solution takes less than to come from zero."""
        rows = self.left(self.enough)
        if len(rows) <= _ALONE and len(self.C) <= _PIVOTED:
            self._follow(rows)
        elif len(rows):
            method = ActiveSet(self.C.numpy(force=True), WORK)
            pairs = zip(*(X[rows].numpy(force=True) for X in (self.Q, self.near)), strict=True)
            Z, residuals = zip(*(method.solve(q, z) for q, z in pairs), strict=True)
            self.keep(rows, torch.from_numpy(np.stack(Z)).to(self.Q), self.Q.new_tensor(residuals))


def one_entry(C: Matrix, Q: Matrix) -> tuple[Matrix, Matrix, float]:
    """
    The z of which one entry may be positive, and their residuals, as of :func:`solve_lcps`.

    They are solutions where all rows of a Jacobian are multiples of one.

    :returns: The two, and the residuals that suffice.
    """
    rows, position = list(range(len(Q))), Q.argmin(1)
    z = (-Q[rows, position]).clip(min=0.0) / C.diagonal()[position]
    y = Q + C[position] * z[:, None]
    Z = 0.0 * Q
    Z[rows, position] = z
    others = abs(C[0, 1:])
    multiples = bool((abs(others - others[-1:]) <= _EQUAL).all())
    residuals = (-y[rows, y.argmin(1)]).clip(min=0.0) / (1.0 + z)
    return Z, residuals, _MULTIPLES if multiples else EXACT


def objective(C: Tensor, Q: Tensor, Z: Tensor) -> Tensor:
    """``zᵀ C z / 2 + qᵀ z``, which solutions minimise, for every row [k]."""
    return (Z * torch.addmm(Q, Z, C, alpha=0.5)).sum(1)


def _sample(rows: Tensor) -> Tensor:
    """The positions of a few of some rows."""
    count = min(_SAMPLE, len(rows))
    return torch.linspace(0, len(rows) - 1, count, device=rows.device).long()


def _smallest_pivot(C: Tensor) -> float:
    """The least squared one of a factorisation, which tells how far rows depend on each other."""
    shifted = C.clone()
    shifted.diagonal().add_(0.1 * _SINGULAR)  # so that only an indefinite matrix has no factor
    factor, failed = factorize(shifted)
    return float(torch.where(failed == 0, factor.diagonal() ** 2, 0.0).min())
