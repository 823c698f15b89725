from __future__ import annotations

import torch
from torch import Tensor

# One number fits all scales, since C has a unit diagonal.
_RHO, _RELAXATION = 0.45, 1.85
_STEPS, _CHECK = 32, 4
_SETTLED = 0.001  # part of the signs that still change in a step when guessing stops


def guess(C: Tensor, Q: Tensor) -> tuple[Tensor, int]:
    """
    Where the solutions of the linear complementarity problems of all rows of Q are, roughly.

    Over-relaxed Douglas-Rachford splitting in X, which is about z where it is positive and about
    ``-y / rho`` elsewhere: one product with a fixed matrix per step for all rows, in float32, which
    tells the signs of all but one to three per cent of the entries. Nothing relies on them.

    :param C: Positive semi-definite matrix with a unit diagonal [m, m], float64.
    :param Q: Vectors [k, m], float64.
    :returns: X [k, m] in float32, and the number of steps; few promise a well-conditioned problem.
    """
    shifted = C.clone()
    shifted.diagonal().add_(_RHO)
    N = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0])
    B = (Q @ N).mul_(-_RELAXATION).float()
    N.mul_(_RELAXATION * _RHO).diagonal().sub_(0.5 * _RELAXATION)
    N = N.float()
    X = Q.neg().float()
    A = torch.empty_like(X)
    for step in range(1, _STEPS + 1):
        check = C.is_cpu and step % _CHECK == 0  # elsewhere, steps cost less than telling
        before = X > 0.0 if check else None
        torch.abs(X, out=A)
        X.mul_(1.0 - 0.5 * _RELAXATION).add_(B).addmm_(A, N)
        if before is not None:
            changes = int(torch.count_nonzero((X > 0.0) ^ before))
            if changes <= _SETTLED * X.numel():
                break
    return X, step
