"""
Weights under which gains and weights are in balance: Nash bargaining, and fairness of any degree.

Find ``a > 0`` with ``(G a)_i = h_i a_i^(-e)``: the gain ``(G a)_i`` of row i falls with its weight.
With D the row norms, ``C = D⁻¹ G D⁻¹`` and ``b = D a``, it is the minimum of the convex
``½ bᵀ C b - Σ k_i b_i^(1 - e) / (1 - e)`` with ``k = h d^(e - 1)`` (``Σ k_i log b_i`` for e = 1).
Damped Newton steps relative to b solve it: with B the diagonal matrix of b and ``s = k b^(1 - e)``
their matrix is ``B C B + e S``, which is positive definite even where C is singular, and no step
leaves ``b > 0``: none shrinks a share by more than a hundred. Where e is small, rows that gain
enough from the others have a share that is a large power of their gain, such as 1e-160, which none
of the others sees: the search ends far above. A proximal term makes a first stage solvable for
every C; a second, which begins once the first is near its end, does without.

Where that fails, 0 lies in the convex hull of some rows, to about 1e-6 of their norms or to the
precision at which they are known. These rows are found in the null space of C and leave the game,
see :class:`~jdcore.protocols.NashBargainingSolver`. Where some are just above that and some just
below, the answer with a proximal term of the precision of the rows conflicts with none beyond that,
and is given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from attrs import define, frozen
from numpy.typing import NDArray

from jdcore.aggregation import report_residual
from jdcore.linalg import EPS, equilibrate, factorize, product, solve_definite, substitute
from jdplugins.standard._solvers._gains_of_few import balance_few
from jdplugins.standard._solvers._tiny import HANDFUL
from jdplugins.standard._solvers._unsolved import UNSOLVED, warn_if_unsolved
from jdplugins.standard._spectrum import spectrum

Floats = NDArray[np.float64]

_PROXIMAL = 1e-12
_STEPS = 100
# From this number of rows on, a factorisation takes longer than a product for every 8 of them.
_MANY, _ROWS_PER_PRODUCT = 96, 8
# Steps by products: how much closer they are to come each time, how close at most, and the least
# eigenvalues of which float32 leaves some digits.
_CLOSER, _CLOSE, _SEEN = 0.1, 1e-4, 1e-4
_NEARBY = 0.1  # see `_Game.nearby`
# Changes that may be left, relative to that: of a solution, and where it is only known about.
_EXACT, _ABOUT = 1e-11, 1e-2
_LEAST, _SHORTEST = 1e-2, 1e-12  # what a step leaves of a share, and the part of it that is made
_ROUNDINGS = 16.0  # of a share, in what it is found by
_UNSEEN = 1e-60  # part of the largest share that changes no sum
# Combinations of stationary rows vanish to 1e-6, which is more than rounding to float32 leaves, or
# to some multiple of their rounding.
_STATIONARY, _ROUNDED = 1e-6, 4.0
# Shares from which on all rows may be found to cancel, and the least of them then, relative to the
# largest; eigenvalues that vanish, and solves that leave nothing else.
_LARGE, _PART, _ZERO, _SOLVES = 1e3, 1e-4, 1e-11, 3
_CONFLICT = 1e-5  # of unit rows with an update, which what is left of stationary ones may cause


# Shares, their residual, and what it may be.
_Answer = tuple[Floats, float, float]


@frozen
class _Gains:
    """
    What of its gain a row is to have for its weight: ``h_i a_i^(-e)``.

    :param exponent: e > 0; 1 for Nash bargaining.
    :param problem: Name of the problem, for warnings.
    """

    exponent: float
    problem: str

    def solve(self, gramian: Floats, level: float | Floats) -> Floats:
        """
        The weights a [m], zero for zero rows.

        :param gramian: Finite Gramian [m, m].
        :param level: Squared length of a combination of unit rows that is rounding, for all rows or
            for each [m].
        """
        if 0 < len(gramian) <= HANDFUL:
            few = balance_few(gramian.tolist(), self.exponent)
            if few is not None:
                report_residual(lambda: few[1])
                return np.array(few[0])
        weights, residual, limit = self._weigh(gramian, level, np.zeros(len(gramian)))
        # A share that is rounded changes what is spent by e times as much.
        rounding = _ROUNDINGS * float(np.finfo(np.float64).eps) * self.exponent
        warn_if_unsolved(self.problem, residual, max(limit, rounding))
        return weights

    # What overflows makes a change that is no number, and ends a search before a step is made.
    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def _weigh(self, gramian: Floats, level: float | Floats, logarithms: Floats) -> _Answer:
        """
        :meth:`solve` for any h.

        :param logarithms: ``log h``, array [m].
        """
        cosines, norms, inverses = equilibrate(gramian)
        rows = np.flatnonzero(norms)
        weights = np.zeros_like(norms)
        if not rows.size:
            return weights, 0.0, UNSOLVED
        if rows.size < norms.size:
            cosines = cosines[np.ix_(rows, rows)]
        # Logarithms, as such powers of norms leave the range of float64 though their products with
        # those of the shares do not.
        scaled = (self.exponent - 1.0) * np.log(norms[rows]) + logarithms[rows]
        largest = float(scaled.max())
        levels = np.broadcast_to(level, norms.shape)[rows]
        shares, residual, limit = self._share(cosines, scaled - largest, levels)
        # The factors were divided by the largest, of which the shares are that power.
        weights[rows] = shares * math.exp(largest / (1.0 + self.exponent)) * inverses[rows]
        return weights, residual, limit

    def _share(self, cosines: Floats, logarithms: Floats, levels: Floats) -> _Answer:
        """The b above for a matrix of cosines and the logarithms of k."""
        game = _game(cosines, logarithms, self.exponent)
        proximal = game.shifted()
        near, change = proximal.newton(game.start(), enough=_ABOUT, until=_LARGE)
        if float(near.max()) > _LARGE:
            combination = _vanishing_altogether(cosines, near)
            if combination is not None:
                return self._cancelling(game, combination, levels)
            near, change = proximal.newton(near, enough=_ABOUT)
        shares, change = game.newton(near, change, give_up=_NEARBY)
        if change > _NEARBY:
            # Which rows are stationary does not depend on what the others bargain for.
            bargained = near if game.is_nash else bargain(cosines)
            null_space = spectrum(cosines).null_space
            combination = null_space @ (null_space.T @ bargained)
            # Its entries are of the order of 1e6. Other shares can be large, but have no such part.
            stationary = combination > max(1e4, 1e-3 * float(combination.max()))
            if stationary.all():
                return self._cancelling(game, combination / combination.max(), levels)
            if stationary.any():
                return self._best_beside(game, bargained, stationary, levels)
            shares, change = game.newton(near)
        shares, seen = game.settled(shares)
        return shares, game.residual(shares, seen, solved=change < _NEARBY), UNSOLVED

    @staticmethod
    def _cancelling(game: _Game, combination: Floats, levels: Floats) -> _Answer:
        everything = np.ones(len(combination), np.bool_)
        residual = game.residual(combination, everything, everything)
        return combination, residual, _allowed(levels)

    def _best_beside(
        self, game: _Game, near: Floats, stationary: NDArray[np.bool_], levels: Floats
    ) -> _Answer:
        """
        :meth:`_beside`, or what the proximal term leaves where that is nearer to what is right.

        Combinations of rows may be of any length, also of about 1e-6, and then some of them count
        as zero and some do not. With the proximal term, none has to be told from the others.
        """
        allowed = _allowed(levels)
        shares = self._beside(game, near, stationary, levels)
        residual = game.residual(shares, game.seen(shares), stationary)
        if residual <= allowed and game.conflict(shares) <= _CONFLICT:
            return shares, residual, allowed
        # Below the precision of the rows, weights would grow until they are made of rounding.
        shift = max(_PROXIMAL, float(levels.max()))
        proximal, _ = game.shifted(shift).newton(game.start())
        limit = max(_CONFLICT, _ROUNDED * math.sqrt(shift))
        return proximal, game.conflict(proximal), limit

    def _beside(
        self, game: _Game, near: Floats, stationary: NDArray[np.bool_], levels: Floats
    ) -> Floats:
        """
        Shares of the other rows orthogonally to the stationary ones, and what cancels them.

        :param stationary: Which rows are so, at least. Those found to be, too, are added to it.
        """
        cosines = game.cosines
        while True:
            inside, outside = np.flatnonzero(stationary), np.flatnonzero(~stationary)
            span = spectrum(cosines[np.ix_(inside, inside)], levels[inside])
            shadows = span.pseudo_solve(cosines[np.ix_(inside, outside)])
            remaining = cosines[np.ix_(outside, outside)] - product(
                cosines[np.ix_(outside, inside)], shadows
            )
            # Rows in the span of a positive combination that is zero take part in another such one.
            left = np.diagonal(remaining)
            rounding = levels[outside] + levels[inside] @ (shadows * shadows)
            gone = left < np.maximum(_ROUNDED * rounding, _PROXIMAL * len(inside))
            if not gone.any():
                break
            stationary[outside[gone]] = True
        combination = span.null_space @ (span.null_space.T @ near[inside])
        if not combination.max() > 0.0:
            return near
        combination /= combination.max()
        shares = np.zeros(len(cosines))
        shares[outside] = self._weigh(remaining, rounding / left, game.logarithms[outside])[0]
        cancelling = -shadows @ shares[outside]
        # Multiples of the combination are free: the least that leaves no share negative, and one
        # more.
        deficit = -cancelling / np.maximum(combination, 1e-9)
        cancelling += (1.0 + max(float(deficit.max()), 0.0)) * combination
        shares[inside] = np.maximum(cancelling, 0.0)
        return shares


@frozen
class NativeNashBargainingSolver:
    """
    Exact Nash bargaining; the native solver of ``problem="nash_bargaining"``.

    The case e = 1 of balanced gains (see the head of this module), for singular Gramians too.
    """

    def __call__(
        self, gramian: Floats, start: Floats | None = None, level: float = 0.0, /
    ) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param start: Not used: the answer is exact from any start.
        :param level: Squared length of a combination of unit rows that is rounding.
        :returns: Weights α [m], zero for zero rows.
        """
        return _Gains(1.0, "nash_bargaining").solve(gramian, level)


@frozen
class NativeFairAllocationSolver:
    """
    Exact alpha-fair allocation; the native solver of ``problem="fair_allocation"``.

    The case ``e = 1 / alpha`` of balanced gains; ``alpha = 1`` is Nash bargaining.
    """

    def __call__(self, gramian: Floats, alpha: float, level: float = 0.0, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param alpha: Degree of fairness, > 0.
        :param level: Squared length of a combination of unit rows that is rounding.
        :returns: Weights w [m], zero for zero rows.
        """
        return _Gains(1.0 / alpha, "fair_allocation").solve(gramian, level)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def bargain(cosines: Floats, shift: float = _PROXIMAL) -> Floats:
    """
    Shares b > 0 of Nash bargaining with ``C + shift I``, for a matrix of cosines C [m, m].

    Rows that cancel have shares of about one over the root of the shift.
    """
    game = _game(cosines, np.zeros(len(cosines)), 1.0)
    return game.shifted(shift).newton(game.start(), enough=_ABOUT)[0]


@frozen
class _Game:
    """
    The minimum of the module docstring, for a matrix of cosines C and the logarithms of k.

    :param narrow: C in float32, in which products take half of the time; None for few rows.
    """

    cosines: Floats
    logarithms: Floats
    exponent: float
    narrow: NDArray[np.float32] | None

    @property
    def is_nash(self) -> bool:
        return self.exponent == 1.0 and not self.logarithms.any()

    @property
    def nearby(self) -> float:
        """
        Relative change from which convergence is certain and quadratic.

        Where the exponent e is large, what is spent is a power of the share that a step of more
        than about 1/e does not follow.
        """
        return _NEARBY / max(1.0, self.exponent)

    def spent(self, shares: Floats) -> Floats:
        """The s of the module docstring: gain times share, as wanted."""
        if self.exponent == 1.0:
            return np.exp(self.logarithms)
        return np.exp(self.logarithms + (1.0 - self.exponent) * np.log(shares))

    @staticmethod
    def seen(shares: Floats) -> NDArray[np.bool_]:
        """Which shares are more than the least that the search goes to."""
        return np.asarray(shares > 2.0 * _UNSEEN * shares.max())

    def residual(
        self,
        shares: Floats,
        counted: NDArray[np.bool_],
        stationary: NDArray[np.bool_] | None = None,
        *,
        solved: bool = True,
    ) -> float:
        """
        What the gains of any row miss, relative to the terms that they are summed from.

        :param counted: Rows that are looked at.
        :param stationary: Rows that are to gain nothing.
        """
        wanted = self.spent(shares)
        scale = wanted + shares * product(np.abs(self.cosines), shares)
        if not solved:  # then large terms excuse nothing
            scale = np.minimum(scale, 1.0)
        if stationary is not None:
            scale = np.where(stationary, 1.0 + scale, scale)
            wanted = np.where(stationary, 0.0, wanted)
        missed = np.abs(shares * product(self.cosines, shares) - wanted) / scale
        return float(missed[counted].max(initial=0.0))

    def conflict(self, shares: Floats) -> float:
        """By how much a row loses at most, relative to an update of length one at least."""
        gains = product(self.cosines, shares)
        return max(0.0, -float(gains.min())) / math.sqrt(max(1.0, float(shares @ gains)))

    def settled(self, shares: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """
        What is not seen, as its gain is that from the others: 0 where float64 ends.

        :returns: The shares, and which of them are seen. A share that would be seen for such a
            gain, or that gains nothing, counts as one of these.
        """
        seen = self.seen(shares)
        if not seen.all():
            gains = np.log(product(self.cosines, shares))
            exact = np.exp((self.logarithms - gains) / self.exponent)
            seen |= ~(exact <= 2.0 * _UNSEEN * shares.max())
            shares = np.where(seen, shares, exact)
        return shares, seen

    def start(self) -> Floats:
        """The best multiple of what is exact for orthogonal rows."""
        power = 1.0 / (1.0 + self.exponent)
        shares = np.exp(self.logarithms * power)
        total = float(shares @ product(self.cosines, shares))
        scale = (float(self.spent(shares).sum()) / max(total, 1e-30)) ** power
        started: Floats = shares * min(scale, 1e6)
        return started

    def shifted(self, shift: float = _PROXIMAL) -> _Game:
        """The game with a proximal term, with which it is solvable for every C."""
        cosines = self.cosines.copy()
        cosines.flat[:: len(cosines) + 1] += shift
        return _Game(cosines, self.logarithms, self.exponent, self.narrow)

    def newton(
        self,
        shares: Floats,
        change: float = math.inf,
        *,
        enough: float = _EXACT,
        give_up: float = math.inf,
        until: float = math.inf,
    ) -> tuple[Floats, float]:
        """
        Minimise.

        :param change: By what part shares changed last.
        :param enough: By what part they may still be wrong at the end.
        :param give_up: Stop before a step that changes a share by more than that.
        :param until: Stop after one that brings a share above that.
        :returns: The shares, and the largest relative change in the last step.
        """
        now, full, narrow = self._at(shares), False, self.narrow
        for _ in range(_STEPS):
            system = self._system(now, near=change < self.nearby)
            accuracy = max(_CLOSER * min(change, 1.0), _CLOSE)
            step = None if narrow is None else system.approximate(narrow, accuracy)
            if step is None:
                narrow, accuracy = None, 0.0
                try:
                    step = system.solve(self.cosines)
                except np.linalg.LinAlgError:  # shares whose squares leave the range of float64
                    return now.shares, math.inf
            growth, previous, change = -float(step.min()), change, float(step.max())
            if change > self.nearby > growth:  # what nobody sees any more may shrink further
                change = float(step[self.seen(now.shares)].max(initial=0.0))
            change = max(change, growth)
            if not change <= give_up or math.isinf(change):
                break
            if change < self.nearby:
                shares = _moved(now.shares, step)
                left = change * max(change / self.nearby, accuracy)
                # After a full step, what has not shrunk by far is rounding.
                if left < enough * self.nearby or (full and change > 0.5 * previous):
                    return shares, change
                now, full = self._at(shares), True
            else:
                now, full = self._along(now, step)
            if until < math.inf and now.shares.max() > until:
                break
        return now.shares, change

    def _at(self, shares: Floats) -> _Point:
        return _Point(shares, shares * product(self.cosines, shares), self.spent(shares))

    def _system(self, now: _Point, *, near: bool) -> _System:
        """What Newton's step solves, relative to the shares."""
        excess, weights = now.gained - now.spent, now.spent
        if not near:
            # At the solution, gained and spent agree. From afar, with what is spent a share that is
            # a million times too large would shrink by a constant factor per step; with the
            # logarithmic mean, one that no other depends on gets right at once, by whatever power.
            means = excess / np.log(now.gained / now.spent)
            weights = np.where(means > 0.0, means, weights)
        weights = self.exponent * weights
        # Rows differ by what is spent on them, which no solver must take for importance.
        inverse_roots = 1.0 / np.sqrt(now.shares * now.shares + weights)
        factors, added = now.shares * inverse_roots, weights * inverse_roots * inverse_roots
        return _System(factors, added, excess * inverse_roots, inverse_roots)

    def _along(self, start: _Point, step: Floats) -> tuple[_Point, bool]:
        """
        The end of a step, and whether that is the full one.

        A step is halved until the objective does not rise by half as much at its end as it falls at
        the beginning.
        """
        slope, size = float((start.gained - start.spent) @ step), 1.0
        while True:
            end, factors = self._at(_moved(start.shares, size * step)), 1.0 - size * step
            excess = end.spent - end.gained
            # Shares that shrink as far as they may stand still, but none may go too far.
            moving = (factors > _LEAST) | (excess > 0.0)
            rates = np.where(moving, step / np.maximum(factors, _LEAST), 0.0)
            rise = float(rates @ excess)
            # Of large shares that cancel, it may be rounding, which must not stop the small ones.
            rounding = EPS * float(np.abs(rates) @ end.shares) * float(end.shares.sum())
            if rise <= 0.5 * slope + rounding or size < _SHORTEST:
                return end, size == 1.0
            size *= 0.5


def _game(cosines: Floats, logarithms: Floats, exponent: float) -> _Game:
    narrow = cosines.astype(np.float32) if len(cosines) >= _MANY else None
    return _Game(cosines, logarithms, exponent, narrow)


def _moved(shares: Floats, step: Floats) -> Floats:
    """Shares after a step, of which one that is to vanish keeps none from growing."""
    moved = shares * np.maximum(1.0 - step, _LEAST)
    bounded: Floats = np.maximum(moved, _UNSEEN * moved.max())
    return bounded


@define
class _Point:
    """Shares, their gains times them, and what is spent on them [m]."""

    shares: Floats
    gained: Floats
    spent: Floats


@define
class _System:
    """``R⁻¹ (F C F + A) R⁻¹ p = R⁻¹ r`` for diagonal matrices; the matrix inside has ones there."""

    factors: Floats
    added: Floats
    right: Floats
    inverse_roots: Floats

    def solve(self, cosines: Floats) -> Floats:
        matrix = cosines * self.factors[:, None]
        matrix *= self.factors
        matrix.flat[:: len(matrix) + 1] += self.added
        solution: Floats = solve_definite(matrix, self.right) * self.inverse_roots
        return solution

    def approximate(self, cosines: NDArray[Any], accuracy: float) -> Floats | None:
        """
        :meth:`solve` by conjugate gradients, for C in float32.

        :returns: p, to a relative accuracy; None where a factorisation takes less time, or rounding
            to float32 leaves too little of C.
        """
        least = float(self.added.min())  # no eigenvalue is below that
        if not least > _SEEN:
            return None
        solution, residual, energy = np.zeros_like(self.right), self.right, 0.0
        direction, squared, before = residual, float(residual @ residual), math.inf
        for _ in range(len(residual) // _ROWS_PER_PRODUCT):
            # That bounds the energy of what is left. The residual by itself tells nothing: few
            # directions can make up most of it, and others nearly all of the solution.
            if squared <= accuracy * accuracy * least * energy:
                return solution * self.inverse_roots
            direction = residual + (squared / before) * direction
            scaled = (self.factors * direction).astype(cosines.dtype)
            image = self.factors * product(cosines, scaled) + self.added * direction
            size = squared / float(direction @ image)
            solution += size * direction
            residual = residual - size * image
            energy += size * squared
            before, squared = squared, float(residual @ residual)
        return None


def _vanishing_altogether(cosines: Floats, shares: Floats) -> Floats | None:
    """
    The part of shares in the null space of C if it is positive throughout; else None.

    By a factorisation, which takes a tenth of the time of eigenvectors.

    :returns: It, relative to its largest entry.
    """
    shifted = torch.from_numpy(cosines.copy())
    shifted.diagonal().add_(_ZERO)
    factor, failed = factorize(shifted)
    if failed.item():
        return None
    combination = torch.from_numpy(shares)[:, None]
    for _ in range(_SOLVES):  # each leaves the null space, and of the rest next to nothing
        before, combination = combination, _ZERO * substitute(factor, combination)
        if not combination.min() > _PART * before.max():
            return None
    found: Floats = combination[:, 0].numpy() / float(combination.max())
    square = float(found @ product(cosines, found))
    rounding = _ROUNDINGS * len(found) * float(np.finfo(np.float64).eps) * float(found @ found)
    return found if square <= rounding else None


def _allowed(levels: Floats) -> float:
    """The residual that rows leave which cancel."""
    return max(_STATIONARY, _ROUNDED * math.sqrt(float(levels.max())))
