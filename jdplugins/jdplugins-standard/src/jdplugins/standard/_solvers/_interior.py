from __future__ import annotations

import torch
from torch import Tensor

from jdcore.linalg import one_thread

_STEPS = 40
_DONE = 1e-23  # mean of z y
_FLOOR = 1e-15
_TO_BOUNDARY = 0.995
_ENTRIES, _ENTRIES_ELSEWHERE = 1 << 21, 1 << 28  # of the matrices that are factorised at once


def interior_point(C: Tensor, Q: Tensor) -> Tensor:
    """
    Solutions to about nine digits by Mehrotra's predictor-corrector method.

    The number of its steps depends on neither size nor degeneracy, and of many solutions it finds
    one where all entries are positive that can be. Block pivoting, which may cycle where rows are
    dependent, finishes from there.

    :param C: Positive semi-definite matrix [m, m], float64.
    :param Q: Vectors [k, m], float64.
    :returns: z >= 0 [k, m].
    """
    m = len(C)
    rows = max(1, (_ENTRIES if C.is_cpu else _ENTRIES_ELSEWHERE) // (m * m))
    with one_thread(C.is_cpu):
        return torch.cat([_solve(C, part) for part in torch.split(Q, rows)])


def _solve(C: Tensor, Q: Tensor) -> Tensor:
    k, m = Q.shape
    z = torch.ones_like(Q)
    y = torch.addmm(Q, z, C).clamp_min_(1.0)
    going = torch.ones((k, 1), dtype=torch.bool, device=C.device)
    for _ in range(_STEPS):
        gap = (z * y).mean(1, keepdim=True)
        going &= gap > _DONE
        if not bool(going.any()):
            break
        infeasible = y - torch.addmm(Q, z, C)
        A = C.expand(k, m, m).clone()
        A.diagonal(dim1=1, dim2=2).add_((y / z).clamp_min(_FLOOR))
        factor, failed = torch.linalg.cholesky_ex(A)
        going &= (failed == 0)[:, None]

        dz, dy = _direction(C, z, -z * y, infeasible, factor)
        size = _room(z, dz, y, dy, 1.0)
        predicted = ((z + size * dz) * (y + size * dy)).mean(1, keepdim=True)
        centring = (predicted / gap).clamp(0.0, 1.0) ** 3
        target = centring * gap - z * y - dz * dy
        dz, dy = _direction(C, z, target, infeasible, factor)
        size = _room(z, dz, y, dy, _TO_BOUNDARY)
        z = torch.where(going, z + size * dz, z)
        y = torch.where(going, y + size * dy, y)
    return torch.where(z > y, z, 0.0)


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
