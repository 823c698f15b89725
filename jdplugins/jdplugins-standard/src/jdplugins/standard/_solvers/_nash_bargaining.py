from __future__ import annotations

import math
import warnings

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdcore.errors import UnsolvedWarning
from jdcore.linalg import equilibrate, product, solve
from jdplugins.standard._solvers._nash_of_few import bargain_few
from jdplugins.standard._spectrum import spectrum

_FEW = 4
_PROXIMAL = 1e-12
_STEPS = 60
_NEARBY = 0.1  # Newton decrement from which convergence is certain and quadratic
_UNSOLVED = 1e-10
# How well combinations of stationary rows vanish; what rounding rows to float32 leaves is less.
_STATIONARY = 1e-6


@frozen
class NativeNashBargainingSolver:
    """
    Exact Nash bargaining; the native solver of ``problem="nash_bargaining"``.

    With D the diagonal matrix of the row norms, ``C = D⁻¹ G D⁻¹`` and ``b = D α``, the equation
    ``C b = 1/b`` says that b minimises the self-concordant ``½ bᵀ C b - Σ log b``. Damped Newton
    steps relative to b solve it: their matrix ``B C B + I`` is positive definite even where C is
    singular, and no step can leave ``b > 0``. A proximal term of 1e-12 makes the first stage
    solvable for every C; the second stage does without.

    Where that fails, 0 lies in the convex hull of some rows, to about 1e-6 of their norms. These
    rows are found in the null space of C and leave the game, see
    :class:`~jdcore.protocols.NashBargainingSolver`.
    """

    def __call__(
        self, gramian: NDArray[np.float64], start: NDArray[np.float64] | None = None, /
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian [m, m].
        :param start: Not used: the answer is exact from any start.
        :returns: Weights α [m], zero for zero rows.
        """
        if 0 < len(gramian) <= _FEW:
            few = bargain_few(gramian.tolist())
            if few is not None:
                return np.array(few)
        cosines, norms, inverses = equilibrate(gramian)
        nonzero = np.flatnonzero(norms)
        if not nonzero.size:
            return np.zeros_like(norms)
        if nonzero.size < norms.size:
            cosines = cosines[np.ix_(nonzero, nonzero)]
        weights = np.zeros_like(norms)
        weights[nonzero] = _bargain(cosines) * inverses[nonzero]
        return weights


def _bargain(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    m = len(cosines)
    # The best multiple of the vector of ones, which is exact for identical or orthogonal rows.
    start = np.full(m, min(math.sqrt(m / max(float(cosines.sum()), 1e-30)), 1e6))
    near, _ = _newton(cosines, start, _PROXIMAL)
    shares, decrement = _newton(cosines, near, 0.0, give_up=_NEARBY)
    if decrement > _NEARBY:
        stationary = _stationary_rows(cosines, near)
        if stationary.any():
            return _bargain_beside(cosines, near, stationary)
        shares, decrement = _newton(cosines, near, 0.0)
    _warn_if_inexact(cosines, shares, 1.0, solved=decrement < _NEARBY)
    return shares


def _newton(
    cosines: NDArray[np.float64],
    shares: NDArray[np.float64],
    shift: float,
    give_up: float = math.inf,
) -> tuple[NDArray[np.float64], float]:
    """Minimise with C + shift I; stop at the first decrement above ``give_up``."""
    diagonal = np.arange(len(shares))
    previous = decrement = math.inf
    for _ in range(_STEPS):
        hessian = cosines * shares[:, None]
        hessian *= shares
        if shift:
            hessian[diagonal, diagonal] += shift * shares * shares
        gradient = hessian.sum(axis=1) - 1.0
        hessian[diagonal, diagonal] += 1.0
        step = solve(hessian, gradient)
        decrement = math.sqrt(max(float(gradient @ step), 0.0))
        if not decrement <= give_up:
            break
        size = 1.0 if decrement <= 0.25 else _step_size(gradient, step, decrement)
        shares = shares * (1.0 - size * step)
        if decrement < 1e-7 or 0.5 * previous < decrement < 1e-4:
            break
        previous = decrement
    return shares, decrement


def _step_size(gradient: NDArray[np.float64], step: NDArray[np.float64], decrement: float) -> float:
    """
    A step length within a factor of 2 of the best one.

    The damped step of the theory, 1/(1 + decrement), is safe but lets a share grow by a factor of
    ``1 + 1/√m`` at most; near stationary points they have to grow to a million.
    """
    # The slope along the step is ``t curvature - tilt + Σ step / (1 - t step)``.
    curvature = float(gradient @ step - step @ step)
    tilt = float(gradient @ step + step.sum())
    limit = 1.0 / max(float(step.max()), 1e-300)  # where the first share becomes 0
    size = 1.0 / (1.0 + decrement)
    while 2.0 * size < limit:
        slope = 2.0 * size * curvature - tilt + float((step / (1.0 - 2.0 * size * step)).sum())
        if not slope < 0.0:
            break
        size *= 2.0
    return size


def _warn_if_inexact(
    cosines: NDArray[np.float64],
    shares: NDArray[np.float64],
    gains: float | NDArray[np.float64],
    *,
    solved: bool = True,
) -> None:
    scale = 1.0 + shares * product(np.abs(cosines), shares) if solved else 1.0
    residual = float((np.abs(shares * product(cosines, shares) - gains) / scale).max())
    if not residual <= (_UNSOLVED if np.all(gains) else _STATIONARY):
        warnings.warn(UnsolvedWarning("nash_bargaining", residual), stacklevel=2)


def _stationary_rows(
    cosines: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """
    Rows with a part in a combination ``v >= 0`` with ``C v = 0``.

    Their shares in the proximal problem are of the order of 1e6, so v is the part of all shares in
    the null space of C. Other shares can be large as well, but have no such part.
    """
    null_space = spectrum(cosines).null_space
    combination = null_space @ (null_space.T @ shares)
    rows: NDArray[np.bool_] = combination > max(1e4, 1e-3 * combination.max())
    return rows


def _bargain_beside(
    cosines: NDArray[np.float64], near: NDArray[np.float64], stationary: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Shares of the other rows orthogonally to the stationary ones, and what cancels the rest."""
    while True:
        inside, outside = np.flatnonzero(stationary), np.flatnonzero(~stationary)
        span = spectrum(cosines[np.ix_(inside, inside)])
        shadows = span.pseudo_solve(cosines[np.ix_(inside, outside)])
        remaining = cosines[np.ix_(outside, outside)] - product(
            cosines[np.ix_(outside, inside)], shadows
        )
        # Rows in the span of a positive combination that is zero take part in another such one.
        rounding = 1e-15 * len(inside) * (1e3 + (shadows * shadows).sum(axis=0))
        gone = np.diagonal(remaining) < rounding
        if not gone.any():
            break
        stationary[outside[gone]] = True
    combination = span.null_space @ (span.null_space.T @ near[inside])
    if not combination.max() > 0.0:
        _warn_if_inexact(cosines, near, 1.0, solved=False)
        return near
    combination /= combination.max()
    shares = np.zeros(len(cosines))
    shares[outside] = NativeNashBargainingSolver()(remaining)
    cancelling = -shadows @ shares[outside]
    # Multiples of the combination are free: the least that leaves no share negative, and one more.
    deficit = -cancelling / np.maximum(combination, 1e-9)
    cancelling += (1.0 + max(float(deficit.max()), 0.0)) * combination
    shares[inside] = np.maximum(cancelling, 0.0)
    _warn_if_inexact(cosines, shares, np.where(stationary, 0.0, 1.0))
    return shares
