from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from jdcore.linalg import EPS, one_thread

_STEPS = 60
_ROUGH, _STALLS = 1e-11, 0.5  # residual that is enough where a step does not improve on it
_INSIDE = 1e-3  # least z and y to begin with
_FLOOR = 1e-15
_SHIFT = 64.0  # times m EPS
FEWER = 3  # times as many rows as their rank make it pay to factorise blocks of its size
_TO_BOUNDARY = 0.995
_SHORT = 0.25
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 18, 1 << 28  # of the matrices that are factorised at once


_Solve: TypeAlias = Callable[[Tensor], Tensor]


def interior_point(C: Tensor, Q: Tensor, start: Tensor, accuracy: float) -> tuple[Tensor, Tensor]:
    """
    Solve linear complementarity problems by Mehrotra's predictor-corrector method.

    It takes 10 to 40 steps, whatever the size and however the rows depend on each other, but each
    costs several of block pivoting: it is for problems on which that cycles. Where C has a low
    rank, systems of that many unknowns are solved in place of those of m.

    :param C: Positive semi-definite matrix [m, m], float64.
    :param Q: Vectors q [k, m], float64.
    :param start: About where z is [k, m]; from ones, it takes more steps, and stalls less often.
    :param accuracy: Residual at which it stops.
    :returns: The best z >= 0 on the way [k, m], and their natural residuals [k].
    """
    newton = _newton(C)
    rows = max(1, (_ENTRIES if C.is_cpu else _ENTRIES_ELSEWHERE) // newton.entries)
    with one_thread(C.is_cpu):
        parts = [
            _solve(C, newton, *part, accuracy)
            for part in zip(torch.split(Q, rows), torch.split(start, rows), strict=True)
        ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _solve(
    C: Tensor, newton: _Newton, Q: Tensor, start: Tensor, accuracy: float
) -> tuple[Tensor, Tensor]:
    best, residuals = torch.zeros_like(Q), Q.amin(1).neg_().clamp_min_(0.0)
    rows, q = torch.arange(len(Q), device=Q.device), Q
    z = start.clamp_min(_INSIDE)
    y = torch.addmm(Q, z, C).clamp_min_(_INSIDE)
    failed = torch.zeros_like(rows)
    for _ in range(_STEPS):
        found = torch.where(z > y, z, 0.0)
        residual = torch.minimum(found, torch.addmm(q, found, C)).abs_().amax(1)
        residual /= 1.0 + found.amax(1)
        best_before = residuals[rows]
        better = residual < best_before
        best[rows] = torch.where(better[:, None], found, best[rows])
        residuals[rows] = torch.where(better, residual, best_before)
        enough = torch.where(residual > _STALLS * best_before, max(accuracy, _ROUGH), accuracy)
        going = ((residual > enough) & (failed == 0)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            rows, q, z, y = rows[going], q[going], z[going], y[going]
        z, y, failed = _step(newton, q, z, y)
    return best, residuals


def _step(newton: _Newton, q: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next z and y, and which of the rows came to an end."""
    gap = (z * y).mean(1, keepdim=True)
    infeasible = y - torch.addmm(q, z, newton.C)
    solve, failed = newton.factorised((y / z).clamp_min(_FLOOR))

    dz, dy = _direction(newton, solve, z, -z * y, infeasible)
    size = _room(z, dz, y, dy, 1.0)
    predicted = ((z + size * dz) * (y + size * dy)).mean(1, keepdim=True)
    # Mehrotra's rule: the further the step without centring gets, the less of it is needed.
    centring = (predicted / gap).clamp(0.0, 1.0) ** 3
    # Of a step that the boundary cuts short, the second-order term is as much smaller: corrected by
    # all of it, the next steps would be as short.
    corrected = torch.where(size < _SHORT, size * size, 1.0)
    target = centring * gap - z * y - corrected * dz * dy
    dz, dy = _direction(newton, solve, z, target, infeasible)
    size = _room(z, dz, y, dy, _TO_BOUNDARY)
    return z + size * dz, y + size * dy, failed


def _direction(
    newton: _Newton, solve: _Solve, z: Tensor, target: Tensor, infeasible: Tensor
) -> tuple[Tensor, Tensor]:
    """The Newton step in z and y towards products ``z y`` that change by the target."""
    dz = solve(target / z + infeasible)
    return dz, torch.addmm(-infeasible, dz, newton.C)


class _Newton:
    """Solves with ``C + D`` for diagonal matrices D, one per row."""

    def __init__(self, C: Tensor) -> None:
        # Where C is singular, nothing else tells z from another.
        self.C = C.clone()
        self.C.diagonal().add_(_SHIFT * len(C) * EPS)

    @property
    def entries(self) -> int:
        """Those of what is factorised for a row."""
        return self.C.numel()

    def factorised(self, D: Tensor) -> tuple[_Solve, Tensor]:
        """What solves, and where it does not, for the diagonals D [k, m]."""
        A = self.C.expand(len(D), *self.C.shape).clone()
        A.diagonal(dim1=1, dim2=2).add_(D)
        factor, failed = torch.linalg.cholesky_ex(A)
        return lambda b: torch.cholesky_solve(b[:, :, None], factor)[:, :, 0], failed


class _LowRank(_Newton):
    """
    The same for ``C = s I + J Jᵀ``, where J has few columns, by factors of their number.

    :param J: Such a matrix [m, r].
    :param s: What is left on the diagonal.
    """

    def __init__(self, C: Tensor, J: Tensor, s: float) -> None:
        super().__init__(C)
        self._J, self._s = J, s + _SHIFT * len(C) * EPS

    @property
    def entries(self) -> int:
        # An eighth of those of Jᵀ E: products with C are most of the work, and want many rows.
        return max(1, self._J.numel() // 8)

    def factorised(self, D: Tensor) -> tuple[_Solve, Tensor]:
        J, E = self._J, 1.0 / (D + self._s)
        A = (J.T * E[:, None]) @ J
        A.diagonal(dim1=1, dim2=2).add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(A)

        def roughly(b: Tensor) -> Tensor:
            inner = torch.cholesky_solve(((b * E) @ J)[:, :, None], factor)[:, :, 0]
            return (b - inner @ J.T) * E

        def solve(b: Tensor) -> Tensor:
            x = roughly(b)  # without digits where D is small
            return x + roughly(b - D * x - x @ self.C)

        return solve, failed


def _newton(C: Tensor) -> _Newton:
    """By the rank of C."""
    m = len(C)
    values, vectors = torch.linalg.eigh(C)
    rounding = _SHIFT * m * EPS
    kept = values > values[0] + rounding
    if int(kept.sum()) * FEWER > m or float(values[0]) < -rounding:
        return _Newton(C)
    rest = float(values[~kept].mean())
    return _LowRank(C, vectors[:, kept] * (values[kept] - rest).sqrt(), rest)


def _room(z: Tensor, dz: Tensor, y: Tensor, dy: Tensor, part: float) -> Tensor:
    """The step length up to a part of the way to the boundary, at most 1."""
    ratio = torch.maximum((-dz / z).amax(1, keepdim=True), (-dy / y).amax(1, keepdim=True))
    return part / ratio.clamp_min(part)
