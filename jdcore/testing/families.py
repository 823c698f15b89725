"""
Seven families of matrices on which aggregation methods succeed or fail for different reasons.

All are float64 and drawn from the given generator, so a seed names a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from jdcore.errors import ParameterError

__all__ = ["FAMILIES", "family"]


def _gauss(m: int, n: int, generator: Generator) -> Tensor:
    """Independent normal entries: nearly orthogonal rows."""
    return torch.randn(m, n, generator=generator, dtype=torch.float64, device="cpu")


def _conflict(m: int, n: int, generator: Generator) -> Tensor:
    """Rows that almost sum to zero, then scaled by up to 5: everything conflicts."""
    rows = _gauss(m, n, generator)
    rows = rows - 0.99 * rows.mean(dim=0)
    return rows * (
        0.2 + 5 * torch.rand(m, 1, generator=generator, dtype=torch.float64, device="cpu")
    )


def _neardup(m: int, n: int, generator: Generator) -> Tensor:
    """Pairs of rows that are equal or opposite up to 1e-4."""
    base = _gauss((m + 1) // 2, n, generator)
    signs = torch.randint(0, 2, (len(base), 1), generator=generator, device="cpu").double() * 2 - 1
    twins = signs * base + 1e-4 * _gauss(len(base), n, generator)
    return torch.stack([base, twins], dim=1).reshape(-1, n)[:m]


def _rankdef(m: int, n: int, generator: Generator) -> Tensor:
    """Rank m/2, with a common component that keeps the dual cone from being {0}."""
    rank = max(1, m // 2)
    factors = _gauss(m, rank, generator)
    factors[:, 0] += 0.35 * math.sqrt(rank)
    return factors @ _gauss(rank, n, generator)


def _lowdim(m: int, n: int, generator: Generator) -> Tensor:
    """Rank m/4 + 1: zero is usually a convex combination of the rows."""
    rank = m // 4 + 1
    return _gauss(m, rank, generator) @ _gauss(rank, n, generator)


def _badscale(m: int, n: int, generator: Generator) -> Tensor:
    """Row norms between 1e-8 and 1e8."""
    exponents = 16 * torch.rand(m, 1, generator=generator, dtype=torch.float64, device="cpu") - 8
    return _gauss(m, n, generator) * 10**exponents


def _special(m: int, n: int, generator: Generator) -> Tensor:
    """An exact duplicate, a zero row, an opposite pair and a combination of rows."""
    rows = _gauss(m, n, generator)
    if m > 1:
        rows[1] = rows[0]
    if m > 2:
        rows[2] = 0.0
    if m > 4:
        rows[4] = -2.0 * rows[3]
    if m > 6:
        rows[6] = 0.5 * rows[3] - 0.25 * rows[5]
    return rows


_MAKERS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "gauss": _gauss,
    "conflict": _conflict,
    "neardup": _neardup,
    "rankdef": _rankdef,
    "lowdim": _lowdim,
    "badscale": _badscale,
    "special": _special,
}

FAMILIES = tuple(_MAKERS)
"""Names of all families."""


def family(name: str, m: int, n: int, *, generator: Generator) -> Tensor:
    """
    Draw a matrix.

    :param name: One of :data:`FAMILIES`.
    :param m: Number of rows.
    :param n: Number of columns.
    :param generator: Source of randomness, on the CPU.
    :returns: float64 Tensor [m, n].
    :raises ParameterError: If there is no such family.
    """
    if name not in _MAKERS:
        raise ParameterError("name", f"one of {', '.join(FAMILIES)}", repr(name))
    return _MAKERS[name](m, n, generator)
