from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Vector = TypeVar("Vector", NDArray[np.float64], Tensor)

# One number fits all scales, since C has a unit diagonal.
_RHO, _RELAXATION = 0.45, 1.85
_STEPS, _CHECK = 256, 4
# Where z and y both vanish, signs are rounding: guessing stops when the signs that change in a step
# are no fewer than 32 steps before.
_ROUND, _FALLS = 32, 0.8
_STEPS_ELSEWHERE = 32  # without a look, for which the host would have to wait

# A step of descent for one right-hand side is a product with a vector. From this size on, that many
# of them take less time than the factorisations that they save.
_LARGE, _DESCENTS, _CHECK_DESCENT = 96, 40, 8


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
    shifted = C.float()
    shifted.diagonal().add_(_RHO)
    X = Q.neg().float()
    N = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0])
    B = (X @ N).mul_(_RELAXATION)
    N.mul_(_RELAXATION * _RHO).diagonal().sub_(0.5 * _RELAXATION)
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


def descend(C: Vector, q: Vector, start: Vector) -> Vector:
    """
    Towards the solution of one linear complementarity problem, by projected gradient steps.

    Their length is that of Barzilai and Borwein, for which the products with C suffice.

    :param C: Positive semi-definite matrix with a diagonal of order one [m, m], float64.
    :param q: Vector [m], float64.
    :param start: Where to begin, z >= 0 [m].
    :returns: ``z - y`` [m] at the end, which is positive where z is likely to be.
    """
    z, y, length = start, C @ start + q, cast(Any, 1.0)
    positive = z > y
    for number in range(1, (_DESCENTS if len(q) >= _LARGE else 1) + 1):
        step = (z - length * y).clip(min=0.0) - z
        change = C @ step
        length = (step @ change) / (change @ change + 1e-300)
        z, y = z + step, y + change
        if number % _CHECK_DESCENT == 0:
            before, positive = positive, z > y
            if bool((positive == before).all()):
                break
    return z - y
