"""
The linear complementarity problem (LCP) that the native solvers share.

Find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C [m, m] is positive semi-definite
with a diagonal of order one and q [m] is of order one. How far a z is from that tells its natural
residual, ``max |min(z, y)|`` relative to ``1 + max z``. Nothing else decides whether an answer is
accepted: all steps on the way may be as wrong as they like.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import report_residual
from jdcore.errors import UnsolvedWarning, warn
from jdcore.linalg import EPS, natural_residual, pivot
from jdplugins.standard._solvers._guess import guess
from jdplugins.standard._solvers._interior import interior_point

Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# Fewer regular rows than this are solved before a guess would be made.
_GUESSED = 48
# Square of the smallest pivot from which C needs no proximal term.
_REGULAR = 1e-6
_LARGE = 1e3  # entries of z that such a C does not give
# Proximal terms on dependent rows. The first must be this large, as the signs of y would be
# rounding with a smaller one; the others take away what it leaves where rows are nearly dependent.
_FIRST, _LATER = 1e-8, (1e-11, 1e-13)
# Those for rows on which pivoting cycles: each problem is easy from the solution of the one before.
_PATH = (1e-3, 1e-5, 1e-7)
# And those about what the interior-point method finds, with the number of rounds. Entries below the
# first number count as zero. Where z and y both vanish, neither has digits, and no round is right.
_FINAL = ((1e-5, 1e-8, 1), (1e-6, 1e-6, 1), (1e-7, 1e-8, 8), (0.0, 1e-12, 8))
_SMALL = 8
_MANY = 4  # rows that cycle, from which it pays to look for a combination of rows that is zero
_SUPPORT, _SHIFT = 1e-6, 1e-9  # of that combination
_ROUNDS, _FEW_ROUNDS = 30, 8

# A residual above the first is handed on to the next method, which has to bring it below the
# second. One above the third shows that pivoting did not come to an end.
ROUGH, _GOOD, _CYCLED = 1e-11, 1e-12, 1e-6

UNSOLVED = 1e-10
"""Relative residual that is worth a warning."""


def solve_lcps(
    C: Tensor, Q: Tensor, passive: Tensor | None = None, references: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Solve the LCPs of all rows of Q.

    :param C: The matrix [m, m], float64, on any device.
    :param Q: Vectors q [k, m], float64.
    :param passive: Where z is positive, if that is known roughly, bool [k, m]; it is overwritten.
    :param references: The rows u [k, m] with ``q = C u``, if the problems are projections.
    :returns: Solutions Z [k, m] and their natural residuals [k].
    """
    answers = _Answers(C, Q)
    if passive is not None or len(Q) == 1:
        start = _first_step(C, Q) if passive is None else passive
        # A block that turns out to be singular gives a large z, whose residual would say little.
        answers.keep_short(pivot(C, Q, start), start)
    elif len(C) < _GUESSED and _is_regular(C):
        answers.pivot(answers.all, -16.0 * len(C) * EPS > Q, 0.0, None, _ROUNDS)
    if answers.done():
        return answers.Z, answers.residuals
    X, _ = guess(C, Q)
    start, centre = X > 0.0, X.clamp_min_(0.0).double()
    regular = len(C) >= _GUESSED and _is_regular(C)
    answers.pivot(answers.all, start, 0.0 if regular else _FIRST, centre, _ROUNDS)
    if not answers.done():
        _finish(answers, centre, references)
    return answers.Z, answers.residuals


def solve_one(C: Floats, q: Floats, passive: Mask | None = None) -> tuple[Floats, float]:
    """:func:`solve_lcps` of one vector q [m], with arrays."""
    start = None if passive is None else torch.from_numpy(passive.copy())[None]
    Z, residuals = solve_lcps(torch.from_numpy(C), torch.from_numpy(q)[None], start)
    return Z[0].numpy(), float(residuals[0])


def warn_if_unsolved(problem: str, residual: float, limit: float = UNSOLVED) -> None:
    """Report a residual; emit an :class:`~jdcore.errors.UnsolvedWarning` above the limit."""
    report_residual(lambda: residual)
    if not residual <= limit:
        warn(UnsolvedWarning(problem, residual))


def _first_step(C: Tensor, Q: Tensor) -> Tensor:
    """The set after one projected gradient step: nearer the solution's than ``q < 0``."""
    Z = (-Q).clamp_min_(0.0)
    return torch.addmm(Q, Z, C) < Z


def _is_regular(C: Tensor) -> bool:
    factor, failed = torch.linalg.cholesky_ex(C)
    return not int(failed) and float(factor.diagonal().min()) ** 2 > _REGULAR


class _Answers:
    """The best answers so far [k, m], their residuals [k], and where they are positive."""

    def __init__(self, C: Tensor, Q: Tensor) -> None:
        self._C, self._Q = C, Q
        self.Z = torch.zeros_like(Q)
        self.residuals = Q.amin(1).neg_().clamp_min_(0.0)
        self._passive = torch.zeros_like(Q, dtype=torch.bool)
        # Small problems and one alone cost little, and are solved as far as rounding allows.
        small = len(Q) == 1 or len(C) <= _SMALL
        self.enough = 8.0 * len(C) * EPS if small else ROUGH
        self.all = torch.arange(len(Q), device=Q.device)

    def done(self) -> bool:
        return bool((self.residuals <= self.enough).all())

    def above(self, limit: float, rows: Tensor) -> Tensor:
        """Those of some rows whose residual is above a limit."""
        return rows[self.residuals[rows] > limit]

    def keep(self, rows: Tensor, Z: Tensor, passive: Tensor) -> None:
        """Take answers that are better than those before."""
        residuals = natural_residual(self._C, self._Q[rows], Z)
        better = residuals < self.residuals[rows]
        rows = rows[better]
        self.Z[rows], self._passive[rows] = Z[better], passive[better]
        self.residuals[rows] = residuals[better]

    def keep_short(self, Z: Tensor, passive: Tensor) -> None:
        """Take answers to all rows that well-conditioned blocks can have given."""
        rows = (Z.amax(1) <= _LARGE).nonzero()[:, 0]
        self.keep(rows, Z[rows], passive[rows])

    def pivot(
        self, rows: Tensor, passive: Tensor, delta: float, centre: Tensor | None, rounds: int
    ) -> Tensor:
        """Solve some rows from these passive sets, which are overwritten; returns their z."""
        q = self._Q[rows]
        Z = pivot(self._C, q, passive, delta=delta, centre=centre, rounds=rounds)
        self.keep(rows, Z, passive)
        return Z

    def improve(self) -> None:
        """Solve about the best answers, where pivoting came to an end."""
        rows = self.above(self.enough, self.all)
        rows = rows[self.residuals[rows] <= _CYCLED]
        for delta in _LATER:
            if len(rows):
                self.pivot(rows, self._passive[rows], delta, self.Z[rows], _FEW_ROUNDS)
            rows = self.above(min(self.enough, _GOOD), rows)

    def restart(self, rows: Tensor) -> None:
        """Solve some rows without regard to the guess."""
        self.pivot(rows, _first_step(self._C, self._Q[rows]), _FIRST, None, _ROUNDS)

    def approach(self, rows: Tensor, Z: Tensor) -> None:
        """Solve rows on which pivoting cycles along the path of proximal terms, from rough z."""
        passive = Z > 0.0
        for delta in _PATH:
            if not len(rows):
                return
            Z = self.pivot(rows, passive, delta, Z, _FEW_ROUNDS)
            left = self.residuals[rows] > _CYCLED
            rows, Z, passive = rows[left], Z[left], passive[left]

    def vanish(self, rows: Tensor, references: Tensor) -> None:
        """
        Try that the projections of some rows are zero, as all are on a linearly dependent support.

        If ``v >= 0`` and ``C v = 0``, then ``z = t v - u`` solves the problem of every u that is at
        most ``t v``: one v serves all rows of its support.
        """
        v = interior_point(self._C + 1.0, torch.full_like(self._Q[:1], -1.0))[0]
        support = (v > _SUPPORT * v.max()).nonzero()[:, 0]
        block = self._C[support[:, None], support]
        shifted = block.clone()
        shifted.diagonal().add_(_SHIFT)
        factor = torch.linalg.cholesky_ex(shifted)[0]
        part = v[support, None]
        for _ in range(2):  # away goes what is not in the null space
            part = part - torch.cholesky_solve(block @ part, factor)
        v = torch.zeros_like(v).index_copy_(0, support, part[:, 0].clamp_min(0.0))
        ratios = torch.where(v > 0.0, references / v, 0.0)
        Z = (ratios.amax(1, keepdim=True).clamp_min(0.0) * v - references).clamp_min_(0.0)
        self.keep(rows, Z, Z > 0.0)

    def enter(self, rows: Tensor) -> None:
        """Solve some rows by the interior-point method."""
        Z = interior_point(self._C, self._Q[rows])
        self.keep(rows, Z, Z > 0.0)
        for small, delta, rounds in _FINAL:
            left = self.residuals[rows] > _GOOD
            rows, Z = rows[left], Z[left]
            if not len(rows):
                return
            passive = small * (1.0 + Z.amax(1, keepdim=True)) < Z
            self.pivot(rows, passive, delta, Z * passive, rounds)


def _finish(answers: _Answers, centre: Tensor, references: Tensor | None) -> None:
    cycled = answers.above(_CYCLED, answers.all)
    if references is not None and len(cycled) > _MANY:
        answers.vanish(cycled, references[cycled])
        cycled = answers.above(_CYCLED, cycled)
    answers.approach(cycled, centre[cycled])
    answers.improve()
    again = answers.above(ROUGH, answers.all)
    if len(again):
        answers.restart(again)
        answers.improve()
    rough = answers.above(ROUGH, answers.all)
    if len(rough):
        answers.enter(rough)
