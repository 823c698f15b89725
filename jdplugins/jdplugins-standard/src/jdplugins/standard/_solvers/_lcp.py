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
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.linalg import EPS, misplaced, natural_residual, one_thread, pivot, refine
from jdplugins.standard._solvers._alone import LARGE, solve_alone
from jdplugins.standard._solvers._faces import find_face
from jdplugins.standard._solvers._guess import Splitting, descend
from jdplugins.standard._solvers._interior import interior_point
from jdplugins.standard._solvers._unsolved import UNSOLVED

Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# Fewer rows than this are solved before a guess would be made.
_GUESSED = 48
# Squared pivots of C. Below the first one, some combination of rows is zero. Where more of them lie
# between both than rounding explains, rows are nearly dependent too, which a proximal term hides.
_SINGULAR, _DISTINCT, _BETWEEN = 1e-10, 1e-6, (2, 1 / 6)
_QUICK, _THOROUGH = 1e-6, 1e-12  # accuracies of the interior-point method
# Rows times the cubes of their number that it may take: some 30 seconds of a CPU.
_WORK = 4e10
_ZERO = 1e-4  # entries of what the interior-point method finds that count as zero

# The scale of the first guess, which suits independent rows, and of those that are tried after it.
_SCALE = 0.45
_SCALES = tuple(_SCALE / 8.0**power for power in range(1, 9))
_STEPS, _STEPS_ELSEWHERE = 64, 32
_MORE_STEPS = (128, 256, 512)
# Guesses go on as long as the number of signs that are wrong falls to this part, or is small.
_FALLS = 0.8
_SAMPLE = 8  # rows that tell which scale is right for all
# Parts of the entries whose signs a guess gets wrong: few enough to go on from there, and to look
# for no better scale.
_HOPEFUL, _GOOD = 0.06, 0.02
# Rounds of pivoting that need not begin near, and the part of rows that may be left after eight.
_PATIENCE, _FUTILE = (8, 100), 0.99
_THREADS = 256  # rows from which on products pay for more threads than one
_ALONE = 4  # rows that the interior-point method solves before a scale would be found


@frozen
class _Way:
    """
    How to go about a matrix.

    :param settled: Part of the signs that may still change in a guess.
    :param delta: Proximal term to pivot with.
    :param rounds: Of pivoting, at most.
    :param singular: Whether the interior-point method first goes as far as pivoting needs only.
    """

    settled: float
    delta: float
    rounds: int
    singular: bool = False


_REGULAR = _Way(5e-4, 0.0, 30)
_MIXED = _Way(5e-4, 1e-11, 30)  # a term above rounding, below what rows differ by
# Of many solutions, a proximal term chooses one near the guess.
_CANCELLING = _Way(5e-5, 1e-8, 6, singular=True)
# Problems of so few rows, and one alone, cost little, and are solved as far as rounding allows:
# where opposite rows make z large, what is small beside it still leaves an error in ``Jᵀ z``.
_SMALL = 8

# A residual above this is handed on to the next method.
ROUGH = 1e-11
# Proximal terms that bring answers nearer, each for residuals from one to another.
_POLISHING, _NEARLY = ((1e-11, ROUGH), (1e-5, UNSOLVED), (1e-5, UNSOLVED)), 1e-7
_POLISHING_ROUNDS = 12  # where rows are many


def solve_lcps(C: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """
    Solve the LCPs of all rows of Q.

    :param C: The matrix [m, m], float64, on any device.
    :param Q: Vectors q [k, m], float64.
    :returns: Solutions Z [k, m] and their natural residuals [k].
    """
    # Threads would wait for each other longer than they work.
    with one_thread(C.is_cpu and len(C) <= _THREADS):
        search = _Search(C, Q)
        search.run()
    return search.Z, search.residuals


class _Search:
    """
    The best answers so far [k, m], their residuals [k], and what makes them better.

    :param C: The matrix [m, m].
    :param Q: Vectors q [k, m].
    """

    def __init__(self, C: Tensor, Q: Tensor) -> None:
        self.C, self.Q, self.way = C, Q, _way(C)
        self.Z = torch.zeros_like(Q)
        self.residuals = Q.amin(1).neg_().clamp_min_(0.0)
        self.all = torch.arange(len(Q), device=Q.device)

    def run(self) -> None:
        one, way = len(self.Q) == 1, self.way
        # On CPUs, what comes alone was pivoted before, in numpy.
        if (len(self.C) < _GUESSED and way is _REGULAR) or (one and not self.C.is_cpu):
            Z, residuals = pivot(self.C, self.Q, _likely(self.C, self.Q))
            # A block that turns out to be singular gives a large z, whose residual says little.
            self.keep(self.all, Z, torch.where(Z.amax(1) <= LARGE, residuals, torch.inf))
        left = self.left()
        if not len(left):
            return
        X = self._guess(left)
        if one or len(self.C) <= _SMALL:
            self.keep(self.all, *refine(self.C, self.Q, self.Z))
        if way.singular:
            self._by_face(left, X)
        self._guess_again(left, X)
        if way.singular:
            left = self.left(_NEARLY)
            self._from_inside(left, torch.ones_like(self.Q[left]), _QUICK, way)
        left = self.left(UNSOLVED)
        self._from_inside(left, torch.ones_like(self.Q[left]), _THOROUGH, way)
        # What stalls on its way from ones gets further from where it stalled. And a proximal term
        # that chooses among solutions hides what rows differ by that nearly cancel beside those
        # that do.
        left = self.left(UNSOLVED)
        self._from_inside(left, self.Z[left], _THOROUGH, _MIXED)

    def left(self, residual: float = ROUGH) -> Tensor:
        """The rows that are not solved yet: those of larger residuals."""
        return self.all[self.residuals > residual]

    def keep(self, rows: Tensor, Z: Tensor, residuals: Tensor) -> None:
        """Take answers to some rows where they are better than those before."""
        better = residuals < self.residuals[rows]
        self.Z[rows] = torch.where(better[:, None], Z, self.Z[rows])
        self.residuals[rows] = torch.where(better, residuals, self.residuals[rows])

    def _guess(self, rows: Tensor) -> Tensor:
        """Guess, and pivot from there if that is close."""
        splitting, Q = Splitting(self.C, _SCALE), self.Q[rows]
        steps = _STEPS if Q.is_cpu else _STEPS_ELSEWHERE
        X, changing = splitting.run(Q, -Q, steps, self.way.settled)
        small = len(self.C) < _GUESSED
        limit = math.inf if small else 2.0 * _HOPEFUL * len(self.C) + 2.0
        if self.way is _REGULAR and not (small or changing):
            self._pivot_patiently(rows, X)
        # To look for a better scale costs less than to pivot from far.
        elif small or not changing or self._wrong(rows, X) <= _GOOD * len(self.C) + 2.0:
            self._pivot_about(rows, X, limit)
        return X

    def _by_face(self, rows: Tensor, X: Tensor) -> None:
        """Solve what is left beside the rows that cancel, if there are any."""
        going = self.residuals[rows] > ROUGH
        rows, X = rows[going], X[going]
        face = find_face(self.C) if len(rows) > _ALONE else None
        if face is not None:
            near = X.clamp_min(0.0).double()
            Z = face.solve(self.Q[rows], near, lambda C, Q: solve_lcps(C, Q)[0])
            self.keep(rows, Z, natural_residual(self.C, self.Q[rows], Z))
            self._polish(rows)

    def _guess_again(self, rows: Tensor, X: Tensor) -> None:
        """Guess those that are left on the scale that suits them, and pivot from there."""
        limit, before = _HOPEFUL * len(self.C) + 2.0, math.inf
        for steps in _MORE_STEPS:
            # What is nearly right is so because many signs are rounding: no guess tells these.
            going = self.residuals[rows] > (_NEARLY if self.way.singular else UNSOLVED)
            rows, X = rows[going], X[going]
            if len(rows) <= _ALONE:
                break
            splitting, wrong = self._scale(rows, X, steps)
            if wrong > max(limit, _FALLS * before):
                break
            before = wrong
            X, _ = splitting.run(self.Q[rows], X, steps)
            if self.way is _REGULAR and wrong > limit:
                self._pivot_patiently(rows, X)
            else:
                self._pivot_about(rows, X, max(limit, 1.5 * wrong))

    def _scale(self, rows: Tensor, X: Tensor, steps: int) -> tuple[Splitting, float]:
        """What suits a sample of some rows best, and how many of its signs are wrong."""
        chosen = torch.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)), device=X.device).long()
        sample, start = rows[chosen], X[chosen]
        best, fewest = None, math.inf
        for rho in _SCALES:
            splitting = Splitting(self.C, rho)
            found, _ = splitting.run(self.Q[sample], start, steps)
            wrong = self._wrong(sample, found)
            if wrong < fewest:
                best, fewest = splitting, wrong
            hopeful = fewest <= _HOPEFUL * len(self.C)
            if fewest <= _GOOD * len(self.C) or (hopeful and wrong > fewest):
                break
        assert best is not None
        return best, fewest

    def _wrong(self, rows: Tensor, X: Tensor) -> float:
        """How many signs of a guess are wrong on average, by a sample."""
        chosen = torch.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)), device=X.device).long()
        Q, centre = self.Q[rows[chosen]], X[chosen].clamp_min(0.0).double()
        counts = misplaced(self.C, Q, centre > 0.0, delta=self.way.delta, centre=centre)
        return float(counts.double().mean())

    def _pivot_patiently(self, rows: Tensor, X: Tensor) -> None:
        """Pivot without a proximal term from any start, as long as that solves some rows."""
        sets = X > 0.0
        for rounds in _PATIENCE:
            self.keep(rows, *pivot(self.C, self.Q[rows], sets, rounds=rounds))
            # Where rows are nearly opposite, signs of y decide that are as small as rounding.
            going = self.residuals[rows] > 6.0 * len(self.C) * EPS
            count = int(going.sum())
            if not 0 < count <= _FUTILE * len(rows):
                break
            rows, sets = rows[going], sets[going]

    def _pivot_about(self, rows: Tensor, X: Tensor, hopeful: float) -> None:
        if not len(rows):
            return
        C, Q, way = self.C, self.Q, self.way
        centre = X.clamp_min(0.0).double()
        sets = centre > 0.0
        found = pivot(
            C, Q[rows], sets, delta=way.delta, centre=centre, rounds=way.rounds, hopeful=hopeful
        )
        self.keep(rows, *found)
        if way.delta:
            self._polish(rows)

    def _polish(self, rows: Tensor) -> None:
        """
        Bring answers that are nearly right nearer.

        What is left of a proximal term, though the signs were right, shows between rows that are
        alike; a small term removes it. Where rows cancel up to rounding, many signs are rounding:
        a large term leaves them as they are.
        """
        C, Q = self.C, self.Q
        rounds = _REGULAR.rounds if len(Q) == 1 or len(C) < _GUESSED else _POLISHING_ROUNDS
        for delta, enough in _POLISHING:
            residuals = self.residuals[rows]
            rows = rows[(residuals > enough) & (residuals < _NEARLY)]
            if not len(rows):
                break
            centre = self.Z[rows]
            sets = centre > 0.0
            self.keep(rows, *pivot(C, Q[rows], sets, delta=delta, centre=centre, rounds=rounds))

    def _from_inside(self, rows: Tensor, start: Tensor, accuracy: float, way: _Way) -> None:
        """
        Interior-point steps for some rows, each from its start, and pivots about what they find.

        If these are too many for :data:`_WORK`, the last ones are left as they are.
        """
        affordable = max(1, int(_WORK / len(self.C) ** 3)) if _WORK else 0
        rows, start = rows[:affordable], start[:affordable]
        if not len(rows):
            return
        self.keep(rows, *interior_point(self.C, self.Q[rows], start, accuracy))
        rows = rows[self.residuals[rows] > ROUGH]
        Z = self.Z[rows]
        self.way = way
        self._pivot_about(rows, torch.where(Z > _ZERO, Z, 0.0), math.inf)


def _way(C: Tensor) -> _Way:
    """What the pivots of a factorisation tell about the dependence of rows."""
    shifted = C.clone()
    shifted.diagonal().add_(0.1 * _SINGULAR)  # so that only an indefinite matrix has no factor
    factor, failed = torch.linalg.cholesky_ex(shifted)
    pivots = torch.where(failed == 0, factor.diagonal() ** 2, 0.0)
    between = ((pivots > _SINGULAR) & (pivots < _DISTINCT)).sum()
    smallest, between = torch.stack((pivots.min(), between)).tolist()
    if smallest >= _SINGULAR:
        return _REGULAR
    if between > _BETWEEN[0] + _BETWEEN[1] * len(C):
        return _MIXED
    return _CANCELLING


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


def _likely(C: Tensor, Q: Tensor) -> Tensor:
    """Where z is likely to be positive."""
    if len(Q) == 1:
        return (descend(C, Q[0], torch.zeros_like(Q[0])) > 0.0)[None]
    Z = (-Q).clamp_min_(0.0)  # after one projected gradient step, nearer the truth than ``q < 0``
    return torch.addmm(Q, Z, C) < Z
