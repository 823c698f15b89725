from __future__ import annotations

import math

import numpy as np
from attrs import define, frozen

from jdcore.aggregation import report_residual
from jdcore.linalg import EPS, equilibrate, lcp_residual, product, solve_definite
from jdplugins.standard._solvers._active_set import block_of
from jdplugins.standard._solvers._alone import solve_one
from jdplugins.standard._solvers._averse_of_few import STATIONARY, avert_few
from jdplugins.standard._solvers._guess import descend
from jdplugins.standard._solvers._lcp import Floats, Mask
from jdplugins.standard._solvers._min_norm import shortest
from jdplugins.standard._solvers._tiny import HANDFUL
from jdplugins.standard._solvers._unsolved import warn_if_unsolved

_MAX_LEVELS = 60
# Relative errors of the norm: as good as can be, and such as nearly dependent rows may force.
# Rescaling v to remove the latter would disturb the levels by as much, so they are left.
_EXACT_NORM, _ROUGH_NORM = 1e-14, 1e-8
_EXACT = 1e-14  # residual of a solution
# From this number of rows on, gradient steps tell about where the level is in less time than LCPs;
# that number of guesses, and the error of one that is good.
_MANY, _GUESSES, _NEAR = 96, 8, 1e-3


@frozen
class NativeConflictAverseSolver:
    """
    Exact direction of the best worst case; the native solver of ``problem="conflict_averse"``.

    The solution is ``d = g0 + Jᵀ v`` with v >= 0, where ``g_i · d >= l`` with equality wherever
    v_i > 0, and ``‖Jᵀ v‖ = c ‖g0‖``. For a given level l this is an LCP. The norm of its ``Jᵀ v``
    grows with l, and for a given passive set it is a closed formula of l, so the level is found in
    a few steps. Where zero lies in the convex hull of the rows (a Pareto-stationary point) and the
    projection of g0 onto the dual cone lies in the ball, that projection is the answer.

    A solution comes with an :class:`~jdcore.errors.UnsolvedWarning` where its duality gap exceeds
    1e-6 of ``‖g0‖ min ‖g_i‖ max(1, c)``: the level, unlike the projections, is known to half of the
    digits only where rows are nearly opposite.
    """

    def __call__(self, gramian: Floats, c: float, level: float = 0.0, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :param c: Radius of the ball relative to the norm of g0, >= 0.
        :param level: The proximal term that the Gramian contains, relative to its diagonal.
        :returns: Weights w [m], ``>= 1 / m`` up to rounding.
        """
        m = len(gramian)
        if m <= HANDFUL and c > 0.0:
            few = avert_few(gramian.tolist(), c, level)
            if few is not None:
                found, residual = few
                report_residual(lambda: residual)
                return np.array(found)
        weights = np.full(m, 1.0 / m)
        cosines, norms, inverses = equilibrate(gramian)
        largest = norms.max()
        if c == 0.0 or largest == 0.0:
            return weights
        mean = norms / (largest * m)
        towards = product(cosines, mean)
        length = math.sqrt(max(float(mean @ towards), 0.0))
        if length <= math.sqrt(m * EPS):  # zero to working precision: the ball is a point
            return weights
        rows = np.flatnonzero(norms)  # the zero rows constrain nothing
        if rows.size < m:
            cosines = cosines[np.ix_(rows, rows)]
        unit = 1.0 / (max(1.0, c) * length)
        problem = _Levels(
            cosines,
            norms[rows].min() * inverses[rows],
            towards[rows] * unit,
            c * length * unit,
            level,
        )
        weights[rows] += problem.solve() * (largest / unit) * inverses[rows]
        return weights


class _Levels:
    """
    The problem in unit rows, lengths being relative to ``max(1, c) ‖g0‖``.

    :param C: Cosines [m, m].
    :param a: ``min(d) / d`` for the row norms d [m]: the level of row i is ``l * a_i``.
    :param b: Inner products of the unit rows with g0 [m].
    :param radius: Radius of the ball.
    :param level: The proximal term that C contains.
    """

    def __init__(self, C: Floats, a: Floats, b: Floats, radius: float, level: float) -> None:
        self.C, self.a, self.b, self.radius, self.level = C, a, b, radius, level

    def solve(self) -> Floats:
        """The v of ``d = g0 + Jᵀ v`` [m]."""
        lowest = float((self.b / self.a).min())  # v is zero there
        many = len(self.b) >= _MANY
        v, excess = (self._roughly if many else self._at)(0.0, np.zeros_like(self.b))
        bracket = Bracket(min(lowest, 0.0), 0.0, -1.0, excess)
        if excess <= _ROUGH_NORM:
            if excess >= -_ROUGH_NORM and not many:
                return v
            if self._stationary():
                z, bracket.above = self._at(0.0, v) if many else (v, excess)
                if bracket.above <= _ROUGH_NORM:
                    return z
            else:
                uppermost = (self.b + self.radius) / self.a
                below = (min(lowest, 0.0), -1.0) if many else (0.0, excess)
                bracket = Bracket(below[0], float(uppermost.min()), below[1], math.inf)
                if not v.any():
                    v[int(uppermost.argmin())] = 1.0
        guess, v = self._near(bracket, v, excess) if many else (math.nan, v)
        return self._search(bracket, guess, v)

    def _near(self, bracket: Bracket, v: Floats, excess: float) -> tuple[float, Floats]:
        """About the level and v of the solution, by steps of Newton's method from level zero."""
        level, least = 0.0, math.inf
        for _ in range(_GUESSES):
            # Half of the square of the norm grows with the level by a @ v.
            slope = float(self.a @ v) / self.radius**2
            level = level - excess * (1.0 + excess) / slope if excess > -1.0 else bracket.high
            level = min(max(level, bracket.low), bracket.high)
            v, excess = self._roughly(level, v)
            if abs(excess) <= _NEAR or abs(excess) > 0.5 * least:
                break
            least = abs(excess)
        return level, v

    def _roughly(self, level: float, start: Floats) -> tuple[Floats, float]:
        """
        About :meth:`_at`, by gradient steps.

        The norm is not less than it is with the multiple of any v >= 0 that lowers the objective
        most, so an excess that is positive here is so in truth.
        """
        q = self.b - level * self.a
        v = descend(self.C, q, start).clip(min=0.0)
        along = -float(q @ v)
        squared = float(v @ product(self.C, v)) + len(v) * EPS * float(v @ v)
        if not (along > 0.0 and 0.0 < squared < math.inf):
            return np.zeros_like(v), -1.0
        return v * (along / squared), along / math.sqrt(squared) / self.radius - 1.0

    def _at(self, level: float, start: Floats) -> tuple[Floats, float]:
        """The v of a level, and by how much the norm of its ``Jᵀ v`` exceeds the radius."""
        q = self.b - level * self.a
        v, _ = solve_one(self.C, q, start > 0.0 if start.any() else None)
        norm = math.sqrt(max(float(v @ product(self.C, v)), 0.0))
        return v, norm / self.radius - 1.0

    def _stationary(self) -> bool:
        """
        Whether zero is in the convex hull of the rows, to working precision.

        It is to theirs if most of what their shortest combination seems to be comes from the
        proximal term: the ball would be spent on a direction that is rounding.
        """
        rounding = STATIONARY * len(self.a)
        z = descend(self.C, -self.a, np.zeros_like(self.a)).clip(min=0.0)
        image = product(self.C, z)
        # The inner products of Jᵀ z with all points of the hull are at least that with a row.
        least = float((image / self.a).min())
        ratio = float(self.a.min())  # whose square may be below the range of floats
        most = max(rounding, 2.0 * self.level / ratio / ratio)
        if least > 0.0 and least * least > most * float(z @ image):
            return False
        z = shortest(self.C, self.a)
        squared = float(z @ product(self.C, z))
        proximal = 2.0 * self.level * float(z @ z)
        return squared <= max(rounding * float(self.a @ z) ** 2, proximal)

    def _search(self, bracket: Bracket, guess: float, v: Floats) -> Floats:
        """Find the level where the norm is the radius, which is about a guess, as is v."""
        best, best_excess, best_level = np.zeros_like(self.b), math.inf, guess
        passive = before = v > 0.0
        for number in range(_MAX_LEVELS):
            if number and (passive == before).all():
                # A closed formula that was wrong for its own passive set suffers from rounding.
                level = bracket.interpolate()
            else:
                level, on = self._on(passive)
                residual = self._residual(level, on)
                known = number or not math.isnan(guess)
                if known and residual <= _EXACT:  # the set of the solution, then
                    best, best_excess, best_level = on, 0.0, level
                    break
                # The formula of a set that is a guess may lead anywhere.
                rough = known and not number and not residual <= _NEAR
                level = bracket.clip(guess if rough else level)
            before = passive
            v, excess = self._at(level, v)
            passive = v > 0.0
            stuck = abs(excess) <= _ROUGH_NORM and abs(excess) > 0.1 * abs(best_excess)
            if abs(excess) < abs(best_excess):
                best, best_excess, best_level = v, excess, level
            if abs(excess) <= _EXACT_NORM or stuck or not bracket.tighten(level, excess):
                break
        # An answer that is too long or too short is brought to the radius, and its residual tells.
        if abs(best_excess) > _ROUGH_NORM and best_excess > -1.0:
            best = best / (1.0 + best_excess)
        warn_if_unsolved("conflict_averse", self._residual(best_level, best))
        return best

    def _residual(self, level: float, v: Floats) -> float:
        return float(lcp_residual(self.C, self.b - level * self.a, v))

    def _on(self, passive: Mask) -> tuple[float, Floats]:
        """The level at which the norm is the radius if the passive set is that, and v; or NaN."""
        v = np.full_like(self.b, math.nan)
        indices = passive.nonzero()[0]
        if indices.size == 0:
            return math.nan, v
        a, b = self.a[indices], self.b[indices]
        largest = float(a.max())
        a /= largest  # as its square may be below the range of floats
        block = block_of(self.C, indices)
        # Dependent rows can be solved for then; the level is a guess, which the next LCP corrects.
        block.flat[:: len(indices) + 1] += 1e-14
        solved = solve_definite(block, np.stack([a, b], axis=1))
        aa, ab, bb = float(a @ solved[:, 0]), float(a @ solved[:, 1]), float(b @ solved[:, 1])
        discriminant = ab * ab - aa * (bb - self.radius * self.radius)
        if discriminant < 0.0:
            return math.nan, v
        level = (ab + math.sqrt(discriminant)) / aa
        v.fill(0.0)
        v[indices] = level * solved[:, 0] - solved[:, 1]
        return level / largest, v


@define
class Bracket:
    """An interval that holds a root of a growing function, with its values at both ends."""

    low: float
    high: float
    below: float
    above: float
    lagging: bool = False

    def clip(self, guess: float) -> float:
        """A guess inside the interval, or at an upper end of unknown value; else another one."""
        near = 1e-9 * max(abs(self.low), abs(self.high))
        if math.isinf(self.above) and abs(guess - self.high) <= near:
            return self.high
        return guess if self.low < guess < self.high else self.interpolate()

    def interpolate(self) -> float:
        """The next guess by the Illinois variant of false position, or by bisection if it lags."""
        if self.lagging or math.isinf(self.above):
            return 0.5 * (self.low + self.high)
        guess = self.low - self.below * (self.high - self.low) / (self.above - self.below)
        return min(max(guess, self.low), self.high)

    def tighten(self, at: float, value: float) -> bool:
        """Replace an end; the result says whether there is room left between the ends."""
        width = self.high - self.low
        if value > 0.0:
            self.high, self.above, self.below = at, value, 0.5 * self.below
        else:
            self.low, self.below, self.above = at, value, 0.5 * self.above
        self.lagging = self.high - self.low > 0.5 * width
        return self.high - self.low > 2.0 * EPS * max(abs(self.low), abs(self.high))
