from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore.linalg import factorize

Floats = NDArray[np.float64]

_RELAXATION = 1.85
_CHECK = 4

# The scale of the first guess, which suits independent rows, and of those that are tried after it,
# by each of which a guess passes on its way to the next one, for some steps.
_SCALE, _FALL, _PASSING = 0.45, 8.0, 8
_SCALES = tuple(_SCALE / _FALL**power for power in range(1, 10))
_AT_ONCE = 3
_DIFFERENT = 12.0  # times the least: what rows have beside the others, where they differ in it
_FIRST_STEPS, _FIRST_STEPS_ELSEWHERE, _MORE_STEPS = 64, 32, 80
# Smallest squared pivot of C from which on steps lead all the way to the solution in less time than
# factorisations do, how many of them correct X at once, and what is missing of an exact one.
_FAST, _CORRECTING, _EXACT = 0.05, 12, 2e-15
_SETTLED = 5e-5  # part of the signs that may still change in a step at the end
GOOD = 0.02
"""Part of the signs that a guess may get wrong without another being looked for."""

# A step of descent for one right-hand side is a product with a vector. From this size on, that many
# of them take less time than the factorisations that they save.
_LARGE, _DESCENTS, _CHECK_DESCENT = 96, 40, 8


class Splitting:
    """
    Where the solutions of the linear complementarity problems of all rows of Q are, roughly.

    Over-relaxed Douglas-Rachford splitting in X, which is about z where it is positive and
    ``-y / rho`` elsewhere: one product with a fixed matrix per step for all rows, in float32, which
    tells the signs of most entries. Nothing relies on them.

    How fast it goes depends on rho, which should be about the geometric mean of the eigenvalues
    that matter: 0.45 for independent rows, less the more these depend on each other. Where rows
    differ by orders of magnitude in what each has beside the others, once all have noise of the
    given size, it may be adapted to be as much of that: all go equally fast then.

    :param C: Positive semi-definite matrix with a unit diagonal [m, m], float64.
    :param scales: Values of rho for independent rows, which are tried side by side [s].
    :param adapted: Whether to adapt these to such rows.
    """

    def __init__(self, C: Tensor, scales: Sequence[float], adapted: bool) -> None:
        self.rho = rho = C.new_tensor(scales)[:, None].expand(-1, len(C))
        if adapted and bool((own := _own_scales(C, rho[-1:])).amax() > _DIFFERENT * own.amin()):
            self.rho = rho = _own_scales(C, rho)
        self._inverses = _shifted_inverses(C, rho)
        matrices = self._inverses * (_RELAXATION * rho[:, :, None])
        matrices.diagonal(dim1=1, dim2=2).sub_(0.5 * _RELAXATION)
        self._matrices = matrices.float()

    def only(self, position: int) -> Splitting:
        """The one of a single scale."""
        chosen = copy(self)
        part = slice(position, position + 1)
        chosen.rho = self.rho[part]
        chosen._inverses, chosen._matrices = self._inverses[part], self._matrices[part]
        return chosen

    def pass_by(self, Q: Tensor, X: Tensor, rho: Tensor) -> Tensor:
        """
        Go a few steps on each scale, from where the one before led.

        :param Q: Vectors [k, m], float64.
        :param X: That of the scale before the first one [k, m].
        :param rho: The one of that scale [m], or for all rows.
        :returns: The X of each scale [s, k, m].
        """
        path = []
        for position, new in enumerate(self.rho):
            # What is negative is -y / rho, and so it grows.
            X = torch.where(X < 0.0, X * (rho / new).float(), X)
            rho = new
            [X], _ = self.only(position).run(Q, X, _PASSING)
            path.append(X)
        return torch.stack(path)

    def run(
        self, Q: Tensor, start: Tensor, steps: int, settled: float | None = None
    ) -> tuple[Tensor, bool]:
        """
        Go some steps.

        :param Q: Vectors [k, m], float64.
        :param start: X to begin with, for all scales [k, m] or for each [s, k, m]. Not modified.
        :param settled: Part of the signs that may still change in a step for it to stop earlier, as
            is asked on CPUs alone: elsewhere, the host would have to wait.
        :returns: X [s, k, m] in float32, and whether it is known to change still.
        """
        B = (Q @ self._inverses).mul_(-_RELAXATION).float()
        return self._steps(B, start, steps, settled)

    def correct(self, Q: Tensor, X: Tensor) -> Tensor:
        """
        Go on to the solutions on a single scale, as long as a few steps halve what is missing.

        That is told in float64. Steps from there in float32, with the signs that X has, correct it.

        :param Q: Vectors [k, m], float64.
        :param X: What :meth:`run` returns, but for its first dimension [k, m].
        :returns: X [k, m], float64, the positive part of which is z.
        """
        [inverse], [rho] = self._inverses, self.rho
        X, least = X.double(), math.inf
        while True:
            missing = torch.addmm(X.clamp_min(0.0), X.abs().mul_(rho).sub_(Q), inverse, beta=-1.0)
            size = float(missing.abs().amax())
            if not _EXACT < size < 0.5 * least:
                return X
            least, B = size, missing.mul_(_RELAXATION).float()[None]
            [change], _ = self._steps(B, B, _CORRECTING, None, X.sign().float())
            X = X + change

    def _steps(
        self,
        B: Tensor,
        start: Tensor,
        steps: int,
        settled: float | None = None,
        signs: Tensor | None = None,
    ) -> tuple[Tensor, bool]:
        """:meth:`run` with the constant part B of a step; and |X| told from its signs."""
        X = start.expand_as(B).clone()
        A = torch.empty_like(X)
        changing = False
        limit = -1.0 if settled is None or not X.is_cpu else settled * X.numel()
        for step in range(1, steps + 1):
            check = limit >= 0.0 and step % _CHECK == 0
            positive = X > 0.0 if check else None
            A = torch.abs(X, out=A) if signs is None else torch.mul(X, signs, out=A)
            X.baddbmm_(A, self._matrices, beta=1.0 - 0.5 * _RELAXATION).add_(B)
            if positive is not None:
                changing = bool(torch.count_nonzero((X > 0.0) ^ positive) > limit)
                if not changing:
                    # What changes little by little for long has far to go.
                    return X, step > steps // 2
        return X, changing


def _own_scales(C: Tensor, rho: Tensor) -> Tensor:
    """What rho is adapted to each row [s, m]."""
    return _SCALE / _shifted_inverses(C, rho / _SCALE).diagonal(dim1=1, dim2=2)


def _shifted_inverses(C: Tensor, rho: Tensor) -> Tensor:
    """Those of ``C + diag(rho)`` for each rho [s, m]."""
    shifted = C.repeat(len(rho), 1, 1)
    shifted.diagonal(dim1=1, dim2=2).add_(rho)
    return torch.cholesky_inverse(factorize(shifted)[0])


def guess(C: Tensor, Q: Tensor, settled: float, pivot: float) -> tuple[Tensor, bool]:
    """
    The X of some rows, on the scale that suits independent ones; of some of these, the exact one.

    :param C: The matrix, as of :class:`Splitting`.
    :param Q: Vectors [k, m].
    :param settled: Part of the signs that may still change in the last step.
    :param pivot: The smallest squared pivot of a factorisation of C. Where rows are random, that is
        about the geometric mean of the least and the largest eigenvalue.
    :returns: X [k, m] in float64, and whether it is known to change still.
    """
    steps = _FIRST_STEPS if Q.is_cpu else _FIRST_STEPS_ELSEWHERE
    splitting = Splitting(C, (max(pivot, _SCALE),), adapted=False)
    [X], changing = splitting.run(Q, -Q.float(), steps, settled)
    return (splitting.correct(Q, X) if pivot >= _FAST else X.double()), changing


def guess_again(
    C: Tensor,
    Q: Tensor,
    X: Tensor,
    sample: Tensor,
    wrong: Callable[[Tensor], Sequence[float]],
    most: float,
) -> tuple[Tensor, float]:
    """
    The X of some rows, on the smaller scale that suits them.

    :param C: The matrix, as of :class:`Splitting`.
    :param Q: Vectors [k, m].
    :param X: That of the first guess [k, m].
    :param sample: The positions of a few rows, which tell the scale for all.
    :param wrong: The parts of the signs that some X of these rows get wrong, [s, n, m] -> [s].
    :param most: The part above which such an X is not worth it.
    :returns: X [k, m], which is the given one then, and the least part.
    """
    splittings: list[Splitting] = []
    few, least, best = X[sample], math.inf, 0
    first = rho = C.new_tensor(_SCALE)
    for start in range(0, len(_SCALES), _AT_ONCE):
        splitting = Splitting(C, _SCALES[start : start + _AT_ONCE], adapted=True)
        splittings.append(splitting)
        path = splitting.pass_by(Q[sample], few, rho)
        few, rho = path[-1], splitting.rho[-1]
        for number, part in enumerate(wrong(splitting.run(Q[sample], path, _MORE_STEPS)[0]), start):
            if part < least:
                least, best = part, number
        if least <= GOOD:
            break
    if least > most:
        return X, least
    rho = first
    for number in range(best + 1):
        splitting = splittings[number // _AT_ONCE].only(number % _AT_ONCE)
        [X] = splitting.pass_by(Q, X, rho)
        [rho] = splitting.rho
    [X], _ = splitting.run(Q, X, _MORE_STEPS, _SETTLED)
    return X, least


@np.errstate(over="ignore", invalid="ignore")  # q may be beyond the range of float32
def descend(C: Floats, q: Floats, start: Floats) -> Floats:
    """
    Towards the solution of one linear complementarity problem, by projected gradient steps.

    Their length is that of Barzilai and Borwein, for which the products with C suffice.

    :param C: Positive semi-definite matrix with a diagonal of order one [m, m], float64.
    :param q: Vector [m], float64.
    :param start: Where to begin, z >= 0 [m].
    :returns: ``z - y`` [m] at the end, which is positive where z is likely to be.
    """
    if len(q) < _LARGE:
        near = (start - (C @ start + q)).clip(min=0.0)
        nearer: Floats = near - (C @ near + q)
        return nearer
    # Products with a matrix take as long as it takes to read it, and nothing relies on the result.
    narrow, z = C.astype(np.float32), start.astype(np.float32)
    y, length = narrow @ z + q.astype(np.float32), np.float32(1.0)
    positive = z > y
    for number in range(1, _DESCENTS + 1):
        step = (z - length * y).clip(min=0.0) - z
        change = narrow @ step
        length = (step @ change) / (change @ change + 1e-30)
        z, y = z + step, y + change
        if number % _CHECK_DESCENT == 0:
            before, positive = positive, z > y
            if (positive == before).all():
                break
    return (z - y).astype(np.float64)
