"""
Weights under which gains and weights are in balance: Nash bargaining, and fairness of any degree.

Find ``a > 0`` with ``(G a)_i = h_i a_i^(-e)``: the gain ``(G a)_i`` of row i falls with its weight.
With D the row norms, ``C = D⁻¹ G D⁻¹`` and ``b = D a``, it is the minimum of the convex
``½ bᵀ C b - Σ k_i b_i^(1 - e) / (1 - e)`` with ``k = h d^(e - 1)`` (``Σ k_i log b_i`` for e = 1).
Damped Newton steps relative to b solve it: with B the diagonal matrix of b and ``s = k b^(1 - e)``
their matrix is ``B C B + e S``, which is positive definite even where C is singular, and no step
leaves ``b > 0``. Where e is small, rows that gain enough from the others have a share that is a
large power of their gain, such as 1e-160: steps to there are made in its logarithm. A proximal term
makes a first stage solvable for every C; a second does without.

Where that fails, 0 lies in the convex hull of some rows, to about 1e-6 of their norms or to the
precision at which they are known. These rows are found in the null space of C and leave the game,
see :class:`~jdcore.protocols.NashBargainingSolver`. Where some are just above that and some just
below, the answer of the first stage conflicts with no row, and is given.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import report_residual
from jdcore.linalg import equilibrate, factorize, product, solve_definite, substitute
from jdplugins.standard._solvers._gains_of_few import balance_few
from jdplugins.standard._solvers._tiny import HANDFUL
from jdplugins.standard._solvers._unsolved import UNSOLVED, warn_if_unsolved
from jdplugins.standard._spectrum import spectrum

Floats = NDArray[np.float64]

_PROXIMAL = 1e-12
_STEPS = 100
# From this number of rows on, a factorisation takes longer than a product for every 8 of them.
_MANY, _ROWS_PER_PRODUCT = 96, 8
_NARROW = 1e-5  # accuracy of products in float32
_CORRECTIONS = 8  # products that suffice where there is a factor in float32
_SEEN = 1e-6  # eigenvalues that rounding to float32 leaves a digit of
_NEARBY = 0.1  # see `_Game.nearby`
_ROUNDINGS = 16.0  # of a share, in what it is found by
_UNSEEN = 1e-60  # part of the largest share that changes no sum
# Combinations of stationary rows vanish to 1e-6, which is more than rounding to float32 leaves, or
# to some multiple of their rounding.
_STATIONARY, _ROUNDED = 1e-6, 4.0
# Shares from which on all rows may be found to cancel, and the least of them then, relative to the
# largest; eigenvalues that vanish, and solves that leave nothing else.
_LARGE, _PART, _ZERO, _SOLVES = 1e3, 1e-3, 1e-11, 3
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
        game = _Game(cosines, logarithms, self.exponent)
        nash = game if game.is_nash else _Game(cosines, np.zeros_like(logarithms), 1.0)
        near, _ = nash.newton(nash.start(), _PROXIMAL, until=_LARGE)
        if float(near.max()) > _LARGE:
            combination = _vanishing_altogether(cosines, near)
            if combination is not None:
                everything = np.ones(len(near), np.bool_)
                return combination, game.residual(combination, everything), _allowed(levels)
            near, _ = nash.newton(near, _PROXIMAL)
        shares, decrement = nash.newton(near, 0.0, give_up=_NEARBY)
        if decrement > _NEARBY:
            # Which rows are stationary does not depend on what the others bargain for.
            combination = _vanishing(cosines, near)
            # Its entries are of the order of 1e6. Other shares can be large, but have no such part.
            stationary = combination > max(1e4, 1e-3 * float(combination.max()))
            if stationary.all():
                combination /= combination.max()
                return combination, game.residual(combination, stationary), _allowed(levels)
            if stationary.any():
                return self._best_beside(game, near, stationary, levels)
            shares, decrement = nash.newton(near, 0.0)
        if game is not nash:
            shares, decrement = game.newton(game.start(), _PROXIMAL)
            shares, decrement = game.newton(shares, 0.0)
        residual = game.residual(shares, solved=decrement < _NEARBY)
        return game.settled(shares)[0], residual, UNSOLVED

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
        residual = game.residual(shares, stationary)
        if residual <= allowed and game.conflict(shares) <= _CONFLICT:
            return shares, residual, allowed
        proximal = near if game.is_nash else game.newton(game.start(), _PROXIMAL)[0]
        return proximal, game.conflict(proximal), _CONFLICT

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
def bargain(cosines: Floats, shift: float) -> Floats:
    """
    Shares b > 0 of Nash bargaining with ``C + shift I``, for a matrix of cosines C [m, m].

    Rows that cancel have shares of about one over the root of the shift.
    """
    game = _Game(cosines, np.zeros(len(cosines)), 1.0)
    return game.newton(game.start(), shift)[0]


@frozen
class _Game:
    """The minimum of the module docstring, for a matrix of cosines C and the logarithms of k."""

    cosines: Floats
    logarithms: Floats
    exponent: float

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
        stationary: NDArray[np.bool_] | None = None,
        *,
        solved: bool = True,
    ) -> float:
        """
        What the gains of any row miss, relative to the terms that they are summed from.

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
        counted = self.seen(shares) if stationary is not None else ~self.settled(shares)[1]
        return float(missed[counted].max(initial=0.0))

    def conflict(self, shares: Floats) -> float:
        """By how much a row loses at most, relative to an update of length one at least."""
        gains = product(self.cosines, shares)
        return max(0.0, -float(gains.min())) / math.sqrt(max(1.0, float(shares @ gains)))

    def settled(self, shares: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """
        What is not seen, as its gain is that from the others: 0 where float64 ends.

        :returns: The shares, and which of them are not seen. A share that would be seen for such a
            gain, or that gains nothing, is none of these.
        """
        gains = np.log(product(self.cosines, shares))
        exact = np.exp((self.logarithms - gains) / self.exponent)
        unseen = ~self.seen(shares) & (exact <= 2.0 * _UNSEEN * shares.max())
        return np.where(unseen, exact, shares), unseen

    def start(self) -> Floats:
        """The best multiple of what is exact for orthogonal rows."""
        power = 1.0 / (1.0 + self.exponent)
        shares = np.exp(self.logarithms * power)
        total = float(shares @ product(self.cosines, shares))
        scale = (float(self.spent(shares).sum()) / max(total, 1e-30)) ** power
        started: Floats = shares * min(scale, 1e6)
        return started

    def newton(
        self, shares: Floats, shift: float, give_up: float = math.inf, until: float = math.inf
    ) -> tuple[Floats, float]:
        """
        Minimise with C + shift I.

        :param give_up: Stop before a step that changes a share by more than that.
        :param until: Stop after one that brings a share above that.
        :returns: The shares, and the largest relative change in the last step.
        """
        nearby = self.nearby
        previous, change, full = math.inf, math.inf, False
        products = len(shares) // _ROWS_PER_PRODUCT if len(shares) >= _MANY else 0
        # Steps may be as rough as float32, in which a product takes half of the time.
        narrow = (
            torch.from_numpy(self.cosines).float() if products else torch.empty(0, device="cpu")
        )
        for _ in range(_STEPS):
            spent, gained = self.spent(shares), self._gained(shares, shift)
            gradient = gained - spent
            # Nearby, where both agree, the mean would take longer than it is worth.
            weights = spent if previous < nearby else _between(gained, spent)
            system = self._system(shares, shift, weights)
            if len(narrow) and float(system.added.min()) <= _SEEN:  # no eigenvalue is below that
                products, narrow = 0, narrow[:0]
            accuracy = max(0.1 * min(previous, 1.0), _NARROW)
            step = system.approximate(gradient, narrow, accuracy, products)
            if step is None and len(narrow):  # as it will be for the next one, too
                products, step = 0, system.corrected(gradient, narrow, accuracy)
            if step is None:
                narrow = narrow[:0]
                try:
                    step = system.solve(gradient)
                except np.linalg.LinAlgError:  # shares whose squares leave the range of float64
                    return shares, math.inf
            change = max(-float(step.min()), float(step.max()))
            if change > nearby:  # what nobody sees any more may shrink further
                change = float(np.abs(step[self.seen(shares) | (step < 0.0)]).max())
            if not change <= give_up or math.isinf(change):
                break
            # After a full step, what has not shrunk by far is rounding.
            stalled = full and 0.5 * previous < change < nearby
            slope = 0.0 if change < nearby else float(gradient @ step)
            shares, full = self._stepped(shares, shift, step, slope)
            if change < 1e-7 or stalled or shares.max() > until:
                break
            previous = change
        return shares, change

    def _gained(self, shares: Floats, shift: float) -> Floats:
        return shares * (product(self.cosines, shares) + shift * shares)

    def _system(self, shares: Floats, shift: float, weights: Floats) -> _System:
        """The Hessian relative to the shares, for what is spent or a mean of that."""
        added = shift * shares * shares + self.exponent * weights
        # Rows differ by what is spent on them, which no solver must take for importance.
        inverse_roots = 1.0 / np.sqrt(self.cosines.diagonal() * shares * shares + added)
        factors = shares * inverse_roots
        return _System(self.cosines, factors, added * inverse_roots**2, inverse_roots)

    def _stepped(
        self, shares: Floats, shift: float, step: Floats, slope: float
    ) -> tuple[Floats, bool]:
        """
        The shares after a step, and whether it is a full one.

        Shares that shrink by much do so by powers, so that none becomes negative; others linearly,
        as combinations that cancel have to stay such.

        :param slope: How steeply the objective falls: a step is halved until it does not rise by
            half as much at its end. Zero takes a full step.
        """
        if slope == 0.0 and float(step.max()) < 0.5:
            return shares * (1.0 - step), True
        size = 1.0
        while True:
            moves = size * step
            linear = moves < 0.5
            factors = np.where(linear, 1.0 - moves, 0.5 * np.exp(0.5 - moves))
            moved = shares * factors
            moved = np.maximum(moved, _UNSEEN * moved.max())
            if slope == 0.0 or size < 1e-12:
                return moved, size == 1.0
            rates = np.where(linear, step / factors, step)
            rise = float(rates @ (self.spent(moved) - self._gained(moved, shift)))
            if rise <= 0.5 * slope:
                return moved, size == 1.0
            size *= 0.5


def _between(gained: Floats, spent: Floats) -> Floats:
    """
    Logarithmic means of what is gained and what is spent, which are equal at the minimum.

    Newton's method has what is spent there, for which a share that is a million times too large
    shrinks by a constant factor per step. With the mean, a share that no other one depends on gets
    right in one step, by whatever power.
    """
    ratios = np.log(np.maximum(gained, 1e-300) / spent)
    near = np.abs(ratios) < 1e-3
    means = np.where(near, 0.5 * (gained + spent), (gained - spent) / np.where(near, 1.0, ratios))
    return np.where(gained > 0.0, means, spent)


@frozen
class _System:
    """``R⁻¹ (F C F + A) R⁻¹`` for diagonal matrices R, F and A, with a diagonal of ones inside."""

    cosines: Floats
    factors: Floats
    added: Floats
    inverse_roots: Floats

    def solve(self, right: Floats) -> Floats:
        matrix = self.cosines * self.factors[:, None]
        matrix *= self.factors
        matrix.flat[:: len(right) + 1] += self.added
        solution: Floats = solve_definite(matrix, right * self.inverse_roots) * self.inverse_roots
        return solution

    def corrected(self, right: Floats, narrow: Tensor, accuracy: float) -> Floats | None:
        """:meth:`approximate` with the help of a factorisation in float32, if there is one."""
        factors, added = (torch.from_numpy(x).float() for x in (self.factors, self.added))
        matrix = (narrow * factors[:, None]).mul_(factors)
        matrix.diagonal().add_(added)
        factor, failed = factorize(matrix)
        if failed.item():
            return None
        return self.approximate(right, narrow, accuracy, _CORRECTIONS, factor)

    def approximate(
        self,
        right: Floats,
        narrow: Tensor,
        accuracy: float,
        products: int,
        factor: Tensor | None = None,
    ) -> Floats | None:
        """
        Conjugate gradients to a relative accuracy; None if that takes more products.

        :param narrow: The cosines in float32.
        :param factor: Cholesky factor of what they are preconditioned by, in float32.
        """
        residual = right * self.inverse_roots
        solution = np.zeros_like(right)
        enough = accuracy * accuracy * float(residual @ residual)
        direction, before = np.zeros_like(right), math.inf
        for _ in range(products):
            if float(residual @ residual) <= enough:
                return solution * self.inverse_roots
            near = residual
            if factor is not None:
                column = torch.from_numpy(residual.astype(np.float32))[:, None]
                near = substitute(factor, column)[:, 0].numpy().astype(np.float64)
            squared = float(residual @ near)
            direction, before = near + (squared / before) * direction, squared
            scaled = torch.from_numpy((self.factors * direction).astype(np.float32))
            image = self.factors * narrow.mv(scaled).numpy() + self.added * direction
            size = squared / float(direction @ image)
            solution += size * direction
            residual = residual - size * image
        return None


def _vanishing(cosines: Floats, shares: Floats) -> Floats:
    """
    The part of some shares that is a combination of rows which is zero, ``C v = 0``.

    :param shares: Those of the proximal problem [m].
    """
    null_space = spectrum(cosines).null_space
    combination: Floats = null_space @ (null_space.T @ shares)
    return combination


def _vanishing_altogether(cosines: Floats, shares: Floats) -> Floats | None:
    """
    :func:`_vanishing`, relative to its largest entry, if it is positive throughout; else None.

    By a factorisation, which takes a tenth of the time of eigenvectors.
    """
    shifted = torch.from_numpy(cosines.copy())
    shifted.diagonal().add_(_ZERO)
    factor, failed = factorize(shifted)
    if failed.item():
        return None
    combination = torch.from_numpy(shares)[:, None]
    for _ in range(_SOLVES):  # each leaves the null space, and of the rest next to nothing
        combination = _ZERO * substitute(factor, combination)
    found: Floats = combination[:, 0].numpy() / float(combination.max())
    square = float(found @ product(cosines, found))
    rounding = _ROUNDINGS * len(found) * float(np.finfo(np.float64).eps) * float(found @ found)
    return found if float(found.min()) > _PART and square <= rounding else None


def _allowed(levels: Floats) -> float:
    """The residual that rows leave which cancel."""
    return max(_STATIONARY, _ROUNDED * math.sqrt(float(levels.max())))
