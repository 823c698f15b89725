"""
The linear complementarity problem (LCP) that the native solvers share.

Find z >= 0 with ``y = C z + q >= 0`` and ``zᵀ y = 0``, where C [m, m] is positive semi-definite
with a diagonal of order one and q [m] is of order one. How far a z is from that tells its natural
residual, ``max |min(z, y)|`` relative to ``1 + max z``. Nothing else decides whether an answer is
accepted: all steps on the way may be as wrong as they like.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import report_residual
from jdcore.errors import UnsolvedWarning, warn
from jdcore.linalg import pivot, refine
from jdplugins.standard._solvers._alone import LARGE, solve_alone
from jdplugins.standard._solvers._guess import descend, guess
from jdplugins.standard._solvers._interior import FEWER, interior_point

Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# Fewer rows than this are solved before a guess would be made.
_GUESSED = 48
# Squared pivots of C. Below the first one, some combination of rows is zero. Where more of them lie
# between both than rounding explains, rows are nearly dependent too, which a proximal term hides.
_SINGULAR, _DISTINCT, _BETWEEN = 1e-10, 1e-6, (2, 1 / 6)
_QUICK, _THOROUGH = 1e-6, 1e-12  # accuracies of the interior-point method
_ZERO = 1e-4  # entries of what the interior-point method finds that count as zero


@frozen
class _Way:
    """
    How to go about a matrix.

    :param settled: Part of the signs that may still change in a guess.
    :param delta: Proximal term to pivot with.
    :param rounds: Of pivoting, at most.
    :param singular: Whether the interior-point method first goes as far as pivoting needs only.
    :param largest: Sets of more indices, as of fewer outside, are left to it at once.
    """

    settled: float
    delta: float
    rounds: int
    singular: bool = False
    largest: float = math.inf


_REGULAR = _Way(5e-4, 0.0, 30)
_MIXED = _Way(5e-4, 1e-11, 30)  # a term above rounding, below what rows differ by
# Of many solutions, a proximal term chooses one near the guess. What cycles then goes on doing so;
# the interior-point method finds the face of the solutions, and need not do more. It costs little
# where the rank of C is low, and sets of many more indices than that have many solutions.
_CANCELLING = _Way(5e-5, 1e-8, 6, singular=True)
# Problems of so few rows, and one alone, cost little, and are solved as far as rounding allows:
# where opposite rows make z large, what is small beside it still leaves an error in ``Jᵀ z``.
_SMALL = 8

# A residual above this is handed on to the next method.
ROUGH = 1e-11

UNSOLVED = 1e-10
"""Relative residual that is worth a warning."""


def solve_lcps(C: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """
    Solve the LCPs of all rows of Q.

    :param C: The matrix [m, m], float64, on any device.
    :param Q: Vectors q [k, m], float64.
    :returns: Solutions Z [k, m] and their natural residuals [k].
    """
    answers = _Answers(Q)
    one, way = len(Q) == 1, _way(C)
    # On CPUs, what comes alone was pivoted before, in numpy.
    if (len(C) < _GUESSED and way is _REGULAR) or (one and not C.is_cpu):
        Z, residuals = pivot(C, Q, _likely(C, Q))
        # A block that turns out to be singular gives a large z, whose residual says little.
        answers.keep(answers.all, Z, torch.where(Z.amax(1) <= LARGE, residuals, torch.inf))
    left = answers.left()
    if not len(left):
        return answers.Z, answers.residuals
    centre = torch.zeros_like(Q)
    centre[left] = guess(C, Q[left], way.settled).clamp_min_(0.0).double()
    sizes = (centre[left] > 0.0).sum(1)
    easy = left[torch.minimum(sizes, len(C) - sizes) <= way.largest]
    _pivot_about(answers, C, Q, easy, centre[easy], way)
    if one or len(C) <= _SMALL:
        answers.keep(answers.all, *refine(C, Q, answers.Z))
    if way.singular:
        left = answers.left()
        _from_inside(answers, C, Q, left, centre[left], _QUICK, way)
    left = answers.left()
    _from_inside(answers, C, Q, left, torch.ones_like(Q[left]), _THOROUGH, way)
    # What stalls on its way from ones gets further from where it stalled. And a proximal term that
    # chooses among solutions hides what rows differ by that nearly cancel beside those that do.
    left = answers.left(UNSOLVED)
    _from_inside(answers, C, Q, left, answers.Z[left], _THOROUGH, _MIXED)
    return answers.Z, answers.residuals


def _from_inside(
    answers: _Answers, C: Tensor, Q: Tensor, rows: Tensor, start: Tensor, accuracy: float, way: _Way
) -> None:
    """Interior-point steps for some rows, each from its start, and pivots about what they find."""
    if not len(rows):
        return
    answers.keep(rows, *interior_point(C, Q[rows], start, accuracy))
    rows = rows[answers.residuals[rows] > ROUGH]
    Z = answers.Z[rows]
    _pivot_about(answers, C, Q, rows, torch.where(Z > _ZERO, Z, 0.0), way)


def _pivot_about(
    answers: _Answers, C: Tensor, Q: Tensor, rows: Tensor, centre: Tensor, way: _Way
) -> None:
    if not len(rows):
        return
    found = pivot(C, Q[rows], centre > 0.0, delta=way.delta, centre=centre, rounds=way.rounds)
    answers.keep(rows, *found)
    # What is left of a proximal term, though the signs were right, shows between rows that are
    # alike.
    left = answers.residuals[rows]
    rows = rows[(left > ROUGH) & (left < 10.0 * way.delta)]
    if len(rows):
        centre = answers.Z[rows]
        answers.keep(rows, *pivot(C, Q[rows], centre > 0.0, delta=_MIXED.delta, centre=centre))


def _way(C: Tensor) -> _Way:
    """What the pivots of a factorisation tell about the dependence of rows."""
    shifted = C.clone()
    shifted.diagonal().add_(0.1 * _SINGULAR)  # so that only an indefinite matrix has no factor
    factor, failed = torch.linalg.cholesky_ex(shifted)
    pivots = torch.where(failed == 0, factor.diagonal() ** 2, 0.0)
    between = ((pivots > _SINGULAR) & (pivots < _DISTINCT)).sum()
    asked = torch.stack((pivots.min(), (pivots > _SINGULAR).sum(), between))
    smallest, rank, between = asked.tolist()
    if smallest >= _SINGULAR:
        return _REGULAR
    if between > _BETWEEN[0] + _BETWEEN[1] * len(C):
        return _MIXED
    low = smallest > 0.0 and rank * FEWER <= len(C)
    return evolve(_CANCELLING, largest=2.0 * rank) if low else _CANCELLING


def solve_one(C: Floats, q: Floats, passive: Mask | None = None) -> tuple[Floats, float]:
    """
    :func:`solve_lcps` of one vector q [m], with arrays.

    :param passive: Where z is positive, if that is known roughly. Not modified.
    """
    alone = solve_alone(C, q, passive)
    if alone is not None:
        return alone
    Z, residuals = solve_lcps(torch.from_numpy(C), torch.from_numpy(q)[None])
    return Z[0].numpy(), float(residuals[0])


def warn_if_unsolved(problem: str, residual: float, limit: float = UNSOLVED) -> None:
    """Report a residual; emit an :class:`~jdcore.errors.UnsolvedWarning` above the limit."""
    report_residual(lambda: residual)
    if not residual <= limit:
        warn(UnsolvedWarning(problem, residual))


def _likely(C: Tensor, Q: Tensor) -> Tensor:
    """Where z is likely to be positive."""
    if len(Q) == 1:
        return (descend(C, Q[0], torch.zeros_like(Q[0])) > 0.0)[None]
    Z = (-Q).clamp_min_(0.0)  # after one projected gradient step, nearer the truth than ``q < 0``
    return torch.addmm(Q, Z, C) < Z


class _Answers:
    """The best answers so far [k, m], and their residuals [k]."""

    def __init__(self, Q: Tensor) -> None:
        self.Z = torch.zeros_like(Q)
        self.residuals = Q.amin(1).neg_().clamp_min_(0.0)
        self.all = torch.arange(len(Q), device=Q.device)

    def left(self, residual: float = ROUGH) -> Tensor:
        """The rows that are not solved yet: those of larger residuals."""
        return self.all[self.residuals > residual]

    def keep(self, rows: Tensor, Z: Tensor, residuals: Tensor) -> None:
        """Take answers to some rows where they are better than those before."""
        better = residuals < self.residuals[rows]
        self.Z[rows] = torch.where(better[:, None], Z, self.Z[rows])
        self.residuals[rows] = torch.where(better, residuals, self.residuals[rows])
