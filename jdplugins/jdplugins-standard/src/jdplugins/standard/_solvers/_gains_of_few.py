"""
Weights in balance with their gains, for a handful of rows, in plain Python floats.

Newton's method as for many rows, without its proximal stage and without a search along its steps:
where no weight is far out, neither is needed. What does not end at a solution is left to numpy.
"""

from __future__ import annotations

import math
from operator import mul

from jdplugins.standard._solvers._tiny import Rows, roots_of, solve_ldl

_STEPS = 32
_CONVERGED = 1e-7  # relative change from which the next step leaves rounding only
_EXACT = 1e-13  # residual of a solution
_NEAR = 1e-10  # squared distance from stationarity up to which other means tell whether it is that


def balance_few(G: Rows, exponent: float) -> tuple[list[float], float] | None:
    """
    Weights ``a > 0`` with ``(G a)_i = a_i^(-e)``.

    :param G: Gramian, as m lists.
    :param exponent: e > 0.
    :returns: The m weights, and their residual relative to what is added up; None where a row is
        zero, or no solution was found.
    """
    roots = roots_of(G)
    if not min(roots) > 0.0:
        return None
    try:
        a = _newton(G, [root ** (-2.0 / (1.0 + exponent)) for root in roots], exponent)
        return None if a is None else _checked(G, a, exponent)
    except (OverflowError, ZeroDivisionError):  # beyond the range of floats
        return None


def _newton(G: Rows, alone: list[float], exponent: float) -> list[float] | None:
    """From what each row would have alone, times what is best for all of them together."""
    everyone, power = list(range(len(G))), 1.0 - exponent
    wanted = sum([x**power for x in alone])
    total = sum([x * sum(map(mul, row, alone)) for x, row in zip(alone, G)])  # noqa: B905
    if total <= 0.0:
        return None
    scale = (wanted / total) ** (1.0 / (1.0 + exponent))
    a, change = [scale * x for x in alone], math.inf
    far = _NEAR ** (-1.0 / (1.0 + exponent))
    for _ in range(_STEPS):
        if change < _CONVERGED:
            return a
        # Relative to the weights, of which none can become negative.
        matrix, excess = [], []
        for i, row in enumerate(G):
            x = a[i]
            gains = [x * y * z for y, z in zip(a, row)]  # noqa: B905
            gained, spent = sum(gains), x**power
            excess.append(spent - gained)
            gains[i] += exponent * _between(gained, spent)
            matrix.append(gains)
        step = solve_ldl(matrix, excess, everyone, 0.0)
        if step is None:
            return None
        change = max(map(abs, step))
        a = [x * (1.0 - y if y < 0.5 else 0.5 * math.exp(0.5 - y)) for x, y in zip(a, step)]  # noqa: B905
        if any(x > far * y for x, y in zip(a, alone)):  # noqa: B905
            return None
    return None


def _between(gained: float, spent: float) -> float:
    """The logarithmic mean, as for many rows."""
    if gained <= 0.0 or abs(gained - spent) < 1e-3 * spent:
        return spent
    return (gained - spent) / math.log(gained / spent)


def _checked(G: Rows, a: list[float], exponent: float) -> tuple[list[float], float] | None:
    residual = 0.0
    for x, row in zip(a, G, strict=True):
        gains, wanted = list(map(mul, row, a)), x**-exponent
        residual = max(residual, abs(sum(gains) - wanted) / (wanted + sum(map(abs, gains))))
    return (a, residual) if residual <= _EXACT else None
