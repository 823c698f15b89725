from __future__ import annotations

import torch
from torch import Tensor

from jdcore.linalg import EPS, one_thread

_STEPS = 60
# Residuals at which it stops, the second where a step does not improve on them.
_SOLVED, _ROUGH, _STALLS = 1e-12, 1e-11, 0.5
_INSIDE = 1e-3  # least z and y to begin with
_FLOOR = 1e-15
_SHIFT = 64.0  # times m EPS: where C is singular, nothing else tells z from another
_TO_BOUNDARY = 0.995
_SHORT = 0.25
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 18, 1 << 28  # of the matrices that are factorised at once


def interior_point(C: Tensor, Q: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """
    Solve linear complementarity problems by Mehrotra's predictor-corrector method.

    It takes 10 to 40 steps, whatever the size and however the rows depend on each other, but each
    costs several of block pivoting: it is for problems on which that cycles.

    :param C: Positive semi-definite matrix [m, m], float64.
    :param Q: Vectors q [k, m], float64.
    :param start: About where z is [k, m].
    :returns: The best z >= 0 on the way [k, m], and their natural residuals [k].
    """
    m = len(C)
    rows = max(1, (_ENTRIES if C.is_cpu else _ENTRIES_ELSEWHERE) // (m * m))
    with one_thread(C.is_cpu):
        parts = [
            _solve(C, *part)
            for part in zip(torch.split(Q, rows), torch.split(start, rows), strict=True)
        ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _solve(C: Tensor, Q: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    k, m = Q.shape
    best, residuals = torch.zeros_like(Q), Q.amin(1).neg_().clamp_min_(0.0)
    shifted = C.clone()
    shifted.diagonal().add_(_SHIFT * m * EPS)
    rows, q = torch.arange(k, device=Q.device), Q
    z = start.clamp_min(_INSIDE)
    y = torch.addmm(Q, z, C).clamp_min_(_INSIDE)
    failed = torch.zeros_like(rows)
    for _ in range(_STEPS):
        # In a solution one of each pair is zero: the smaller one, near it.
        found = torch.where(z > y, z, 0.0)
        residual = torch.minimum(found, torch.addmm(q, found, C)).abs_().amax(1)
        residual /= 1.0 + found.amax(1)
        best_before = residuals[rows]
        better = residual < best_before
        best[rows] = torch.where(better[:, None], found, best[rows])
        residuals[rows] = torch.where(better, residual, best_before)
        enough = torch.where(residual > _STALLS * best_before, _ROUGH, _SOLVED)
        going = ((residual > enough) & (failed == 0)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            rows, q, z, y = rows[going], q[going], z[going], y[going]
        z, y, failed = _step(shifted, q, z, y)
    return best, residuals


def _step(C: Tensor, q: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next z and y, and which of the rows came to an end."""
    k, m = q.shape
    gap = (z * y).mean(1, keepdim=True)
    infeasible = y - torch.addmm(q, z, C)
    A = C.expand(k, m, m).clone()
    A.diagonal(dim1=1, dim2=2).add_((y / z).clamp_min(_FLOOR))
    factor, failed = torch.linalg.cholesky_ex(A)

    dz, dy = _direction(C, z, -z * y, infeasible, factor)
    size = _room(z, dz, y, dy, 1.0)
    predicted = ((z + size * dz) * (y + size * dy)).mean(1, keepdim=True)
    # Mehrotra's rule: the further the step without centring gets, the less of it is needed.
    centring = (predicted / gap).clamp(0.0, 1.0) ** 3
    # Of a step that the boundary cuts short, the second-order term is as much smaller: corrected by
    # all of it, the next steps would be as short.
    corrected = torch.where(size < _SHORT, size * size, 1.0)
    target = centring * gap - z * y - corrected * dz * dy
    dz, dy = _direction(C, z, target, infeasible, factor)
    size = _room(z, dz, y, dy, _TO_BOUNDARY)
    return z + size * dz, y + size * dy, failed


def _direction(
    C: Tensor, z: Tensor, target: Tensor, infeasible: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The Newton step in z and y towards products ``z y`` that change by the target."""
    dz = torch.cholesky_solve((target / z + infeasible)[:, :, None], factor)[:, :, 0]
    return dz, torch.addmm(-infeasible, dz, C)


def _room(z: Tensor, dz: Tensor, y: Tensor, dy: Tensor, part: float) -> Tensor:
    """The step length up to a part of the way to the boundary, at most 1."""
    ratio = torch.maximum((-dz / z).amax(1, keepdim=True), (-dy / y).amax(1, keepdim=True))
    return part / ratio.clamp_min(part)
