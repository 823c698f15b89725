from __future__ import annotations

import torch
from torch import Tensor

# One number fits all scales, since C has a unit diagonal.
_RHO, _RELAXATION = 0.45, 1.85
_STEPS, _CHECK = 256, 4
# Where z and y both vanish, signs are rounding: guessing stops when the signs that change in a step
# are no fewer than 32 steps before.
_ROUND, _FALLS = 32, 0.8
_STEPS_ELSEWHERE = 32  # without a look, for which the host would have to wait


def guess(C: Tensor, Q: Tensor, settled: float) -> Tensor:
    """
    Where the solutions of the linear complementarity problems of all rows of Q are, roughly.

    Over-relaxed Douglas-Rachford splitting in X, which is about z where it is positive and about
    ``-y / rho`` elsewhere: one product with a fixed matrix per step for all rows, in float32, which
    tells the signs of all but one to three per cent of the entries. Nothing relies on them.

    :param C: Positive semi-definite matrix with a unit diagonal [m, m], float64.
    :param Q: Vectors [k, m], float64.
    :param settled: Part of the signs that may still change in a step.
    :returns: X [k, m] in float32.
    """
    shifted = C.clone()
    shifted.diagonal().add_(_RHO)
    N = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0])
    B = (Q @ N).mul_(-_RELAXATION).float()
    N.mul_(_RELAXATION * _RHO).diagonal().sub_(0.5 * _RELAXATION)
    N = N.float()
    X = Q.neg().float()
    A = torch.empty_like(X)
    before = X.numel()
    for step in range(1, (_STEPS if C.is_cpu else _STEPS_ELSEWHERE) + 1):
        check = C.is_cpu and step % _CHECK == 0
        positive = X > 0.0 if check else None
        torch.abs(X, out=A)
        X.mul_(1.0 - 0.5 * _RELAXATION).add_(B).addmm_(A, N)
        if positive is not None:
            changes = int(torch.count_nonzero((X > 0.0) ^ positive))
            if changes <= settled * X.numel():
                break
            if step % _ROUND == 0:
                if changes > _FALLS * before:
                    break
                before = changes
    return X
