"""
Nash bargaining of a handful of rows, in plain Python floats.

The same Newton iteration as for many rows, without its proximal stage: where the problem has a
solution that is not far out, none is needed.
"""

from __future__ import annotations

import math
from operator import mul

from jdplugins.standard._solvers._tiny import equilibrate_tiny, solve_ldl

_STEPS = 30
_CONVERGED = 1e-7  # Newton decrement from which the next step leaves rounding only
_ROUNDING = 1e-15
_FAR = 1e4  # shares of nearly stationary rows, to be told from stationary ones by other means


def bargain_few(G: list[list[float]]) -> list[float] | None:
    """
    Weights α with ``G α = 1/α``.

    :param G: Gramian, as m lists.
    :returns: None where a row is zero, or no solution was found: the other path tells why.
    """
    equilibrated = equilibrate_tiny(G)
    if equilibrated is None:
        return None
    C, _, inverses = equilibrated
    total = sum(map(sum, C))
    if total <= 0.0:
        return None
    shares = _newton(C, [math.sqrt(len(C) / total)] * len(C))
    return None if shares is None else list(map(mul, shares, inverses))


def _newton(C: list[list[float]], shares: list[float]) -> list[float] | None:
    everyone = list(range(len(C)))
    decrement = math.inf
    for _ in range(_STEPS):
        inverse = [1.0 / share for share in shares]
        residual = [sum(map(mul, row, shares)) - x for row, x in zip(C, inverse)]  # noqa: B905
        largest = max(shares)
        if decrement < _CONVERGED:
            rounding = _ROUNDING * (1.0 + largest * sum(shares))
            solved = max(map(abs, map(mul, residual, shares))) <= rounding
            return shares if solved else None
        if largest > _FAR:
            return None
        # The Hessian is C plus the diagonal matrix of 1/b², and C has a unit diagonal.
        step = solve_ldl(C, residual, everyone, [1.0 + x * x for x in inverse], 0.0)
        if step is None:
            return None
        decrement = math.sqrt(max(-sum(map(mul, residual, step)), 0.0))
        size = 1.0 if decrement <= 0.25 else 1.0 / (1.0 + decrement)
        shares = [share + size * x for share, x in zip(shares, step)]  # noqa: B905
    return None
