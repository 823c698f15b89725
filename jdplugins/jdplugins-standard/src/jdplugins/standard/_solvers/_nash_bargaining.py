from __future__ import annotations

import math
import warnings

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdcore.errors import UnsolvedWarning
from jdcore.linalg import equilibrate
from jdplugins.standard._spectrum import spectrum

_PROXIMAL = 1e-12
_STEPS = 60
_UNSOLVED = 1e-10


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

    def __call__(self, gramian: NDArray[np.float64], /) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian [m, m].
        :returns: Weights α [m], zero for zero rows.
        """
        cosines, norms, inverses = equilibrate(gramian)
        nonzero = norms > 0.0
        if nonzero.all():
            return _bargain(cosines) * inverses
        shares = np.zeros(len(gramian))
        if nonzero.any():
            shares[nonzero] = _bargain(cosines[np.ix_(nonzero, nonzero)])
        return shares * inverses


def _bargain(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    m = len(cosines)
    # The best multiple of the vector of ones, which is exact for identical or orthogonal rows.
    start = np.full(m, min(math.sqrt(m / max(float(cosines.sum()), 1e-30)), 1e6))
    near, _ = _newton(cosines, start, _PROXIMAL)
    shares, decrement = _newton(cosines, near, 0.0)
    if decrement < 0.1:
        _warn_if_inexact(cosines, shares)
        return shares
    stationary = _stationary_combination(cosines, near)
    if not stationary.any():
        _warn_if_inexact(cosines, near)
        return near
    return _bargain_beside(cosines, stationary)


def _newton(
    cosines: NDArray[np.float64], shares: NDArray[np.float64], shift: float
) -> tuple[NDArray[np.float64], float]:
    """Minimise with C + shift I. Without shift, give up where no minimiser is near the start."""
    diagonal = np.arange(len(shares))
    previous = decrement = math.inf
    for _ in range(_STEPS):
        hessian = cosines * shares[:, None]
        hessian *= shares
        if shift:
            hessian[diagonal, diagonal] += shift * shares * shares
        gradient = hessian.sum(axis=1) - 1.0
        hessian[diagonal, diagonal] += 1.0
        step = np.linalg.solve(hessian, gradient)
        decrement = math.sqrt(max(float(gradient @ step), 0.0))
        if not shift and not decrement < 0.1:
            break
        # No entry of the step exceeds the decrement, so that damping keeps the shares positive.
        shares = shares * (1.0 - (step / (1.0 + decrement) if decrement > 0.25 else step))
        if decrement < 1e-7 or 0.5 * previous < decrement < 1e-4:
            break
        previous = decrement
    return shares, decrement


def _warn_if_inexact(cosines: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
    gains = shares * (cosines @ shares)
    scale = 1.0 + shares * (np.abs(cosines) @ shares)
    residual = float((np.abs(gains - 1.0) / scale).max())
    if not residual <= _UNSOLVED:
        warnings.warn(UnsolvedWarning("nash_bargaining", residual), stacklevel=2)


def _stationary_combination(
    cosines: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """
    The combination v >= 0 with ``C v = 0`` of largest support, scaled to max v = 1, or zeros.

    The shares of the proximal problem grow without bound exactly on that support, so they are close
    to such a combination and the projection onto the null space of C makes it exact.
    """
    null = spectrum(cosines).null_space
    combination: NDArray[np.float64] = null @ (null.T @ shares)
    largest = float(combination.max())
    if largest < 1e4:
        return np.zeros_like(combination)
    combination /= largest
    combination[combination < 1e-6] = 0.0
    return combination


def _bargain_beside(
    cosines: NDArray[np.float64], stationary: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shares of the other rows orthogonally to the stationary ones, and what cancels the rest."""
    inside = np.flatnonzero(stationary)
    outside = np.flatnonzero(stationary == 0.0)
    shares = stationary.copy()
    if outside.size == 0:
        return shares
    shadows = spectrum(cosines[np.ix_(inside, inside)]).pseudo_solve(
        cosines[np.ix_(inside, outside)]
    )
    remaining = cosines[np.ix_(outside, outside)] - cosines[np.ix_(outside, inside)] @ shadows
    # What is left of a row that lies in the span of the stationary ones is rounding.
    gone = np.diagonal(remaining) < 1e-12
    remaining[gone] = remaining[:, gone] = 0.0
    shares[outside] = NativeNashBargainingSolver()(remaining)
    shares[inside] = -shadows @ shares[outside]
    # Any multiple of the stationary combination is free: the least that leaves no share negative,
    # and one more.
    deficit = -shares[inside] / stationary[inside]
    shares[inside] += (1.0 + max(float(deficit.max()), 0.0)) * stationary[inside]
    return shares
