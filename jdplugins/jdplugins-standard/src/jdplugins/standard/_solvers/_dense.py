"""
The LCP for many right-hand sides together, by proximal block principal pivoting.

Each level solves the LCP with ``C + delta I`` and ``q - delta z``, z being the solution of the
level before, by exchanging all infeasible indices at once (Júdice and Pires), with Murty's rule as
the safeguard. The added term makes every subproblem solvable although C may be singular; steps of
iterative refinement with the same matrix then remove its effect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from jdcore.linalg import lcp_residual, product, solve
from jdplugins.standard._solvers._accuracy import (
    ROUGH,
    Floats,
    Indices,
    Mask,
    accepted,
    infeasible,
    levels,
    pivot_tolerance,
)

_MASKED = 24  # up to this size, gathering the passive block costs more than it saves
_FEW = 100  # entries of the problems that are small and few
_EXCHANGES = 12
_BUDGET = 1 << 19  # entries of the matrices that are gathered at once
_CREDIT = 3  # block exchanges that may fail to reduce the infeasibilities
_FIRST_PIVOTS = 40
_LATER_PIVOTS = 6
_REFINEMENTS = 2


def solve_dense(
    C: Floats, Q: Floats, passive: Mask | None = None, deltas: tuple[float, ...] | None = None
) -> tuple[Floats, Floats]:
    """
    Solve the LCPs of all rows of Q.

    :param C: Unit-diagonal positive semi-definite matrix [m, m].
    :param Q: Vectors q [k, m].
    :param passive: Where z is expected to be positive [k, m], if that is known roughly.
    :param deltas: :func:`levels` of C, if they are known.
    :returns: Solutions Z [k, m] and their natural residuals relative to ``1 + max z`` [k].
    """
    m = Q.shape[1]
    F = infeasible(Q) if passive is None else passive
    Z = np.zeros_like(Q)
    residual = np.maximum(-Q.min(axis=1), 0.0)
    rows = np.flatnonzero(F.any(axis=1) | (residual > pivot_tolerance(m)))
    if rows.size == 0:
        return Z, residual
    for level, delta in enumerate(levels(C) if deltas is None else deltas):
        centre = Z[rows]
        q = Q[rows]
        f = F[rows]
        z = _pivot(C, delta * centre - q, f, delta, _LATER_PIVOTS if level else _FIRST_PIVOTS)
        if delta:
            z = _refine(C, q, z, f, delta)
        new = lcp_residual(C, q, z)
        old = residual[rows]
        better = new < old
        improved = rows[better]
        Z[improved] = z[better]
        F[improved] = f[better]
        residual[improved] = new[better]
        left = residual[rows] > accepted(m)
        # Once a level gains nothing, the answer is as accurate as C itself.
        left &= (residual[rows] > ROUGH) | (new < 0.1 * old)
        rows = rows[left]
        if rows.size == 0:
            break
    return Z, residual


def _pivot(C: Floats, B: Floats, F: Mask, delta: float, limit: int) -> Floats:
    """Solve the LCPs of ``C + delta I`` and ``-B`` from the passive sets F, updated in place."""
    k, m = B.shape
    if B.size <= _FEW:
        few = _exchange_blocks(C, B, F, delta)
        if few is not None:
            return few
    Z = np.empty_like(B)
    fewest = np.full(k, m + 1)
    credit = np.full(k, _CREDIT)
    rows = np.arange(k)
    for _ in range(limit):
        b, f = B[rows], F[rows]
        z, bad = _step(C, b, f, delta)
        Z[rows] = z
        count = bad.sum(axis=1)
        going = count > 0
        if not going.any():
            break
        rows, bad, count = rows[going], bad[going], count[going]
        fewer = count < fewest[rows]
        fewest[rows] = np.minimum(count, fewest[rows])
        credit[rows] = np.where(fewer, _CREDIT, credit[rows] - 1)
        F[rows] ^= _exchanged(bad, credit[rows] >= 0)
    return np.maximum(Z, 0.0, out=Z)


def _exchange_blocks(C: Floats, B: Floats, F: Mask, delta: float) -> Floats | None:
    """
    :func:`_pivot` of few small problems: solving all until the last is done takes fewer calls than
    telling them apart. None if a block exchange does not finish.
    """
    for _ in range(_EXCHANGES):
        z, bad = _step(C, B, F, delta)
        if not bad.any():
            return np.maximum(z, 0.0, out=z)
        F ^= bad
    return None


def _step(C: Floats, B: Floats, F: Mask, delta: float) -> tuple[Floats, Mask]:
    """The z of the passive sets F, and which of its entries, or of those of y, are negative."""
    z = _passive_solver(C, F, delta)(B)
    y = product(z, C)
    y -= B
    y += pivot_tolerance(B.shape[1]) * (1.0 + np.abs(z).max(axis=1, keepdims=True))
    return z, np.where(F, z, y) < 0.0


def _exchanged(bad: Mask, block: Mask) -> Mask:
    """All infeasible indices where block exchange is allowed, else only the last of each row."""
    if block.all():
        return bad
    last = bad.shape[1] - 1 - np.argmax(bad[:, ::-1], axis=1)
    single = np.zeros_like(bad)
    single[np.arange(len(bad)), last] = True
    return np.where(block[:, None], bad, single)


def _refine(C: Floats, Q: Floats, Z: Floats, F: Mask, delta: float) -> Floats:
    """Steps towards the solution without the proximal term, as far as no sign would change."""
    residual: Floats
    solve_passive = _passive_solver(C, F, delta)
    for _ in range(_REFINEMENTS):
        residual = product(Z, C)
        residual += Q
        residual *= F
        if np.abs(residual).max() <= 1e-16:
            break
        refined = Z - solve_passive(residual)
        negative = refined.min(axis=1) < 0.0
        if negative.any():
            refined[negative] = Z[negative]
        Z = refined
    return Z


def _passive_solver(C: Floats, F: Mask, delta: float) -> Callable[[Floats], Floats]:
    """What finds rows z with ``(C_FF + delta I) z_F = b_F`` and zero outside the row's set F."""
    m = C.shape[0]
    if m > _MASKED:
        return partial(_solve_in_chunks, C, F, delta)
    A = C * (F[:, :, None] & F[:, None, :])
    diagonal = np.arange(m)
    A[:, diagonal, diagonal] = np.where(F, 1.0 + delta, 1.0)
    return lambda B: _solve_batch(A, B * F)


def _solve_in_chunks(C: Floats, F: Mask, delta: float, B: Floats) -> Floats:
    sizes = F.sum(axis=1)
    Z = np.zeros_like(B)
    order = np.argsort(sizes, kind="stable")
    chunk = max(1, _BUDGET // max(1, int(sizes.max(initial=0))) ** 2)
    for start in range(0, len(order), chunk):
        rows = order[start : start + chunk]
        Z[rows] = _solve_gathered(C, B[rows], F[rows], sizes[rows], delta)
    return Z


def _solve_batch(A: Floats, B: Floats) -> Floats:
    return solve(A, B[:, :, None])[:, :, 0]


def _solve_gathered(C: Floats, B: Floats, F: Mask, sizes: Indices, delta: float) -> Floats:
    Z = np.zeros_like(B)
    p = int(sizes.max())
    if p == 0:
        return Z
    # The passive indices first; shorter sets are padded with a unit matrix.
    indices = np.argsort(~F, axis=1, kind="stable")[:, :p]
    valid = np.arange(p) < sizes[:, None]
    A = C[indices[:, :, None], indices[:, None, :]]
    if not valid.all():
        A *= valid[:, :, None]
        A *= valid[:, None, :]
    diagonal = np.arange(p)
    A[:, diagonal, diagonal] = np.where(valid, 1.0 + delta, 1.0)
    b = np.take_along_axis(B, indices, axis=1) * valid
    np.put_along_axis(Z, indices, _solve_batch(A, b), axis=1)
    return Z
