"""
An independent solution of the LCP in extended precision, one index at a time.

Written for certainty, not for speed: numpy's longdouble (64 bits of mantissa on x86) throughout, a
textbook active-set method, and a rank-revealing Cholesky factorisation by explicit loops.
"""

from __future__ import annotations

import numpy as np

LD = np.longdouble


def cosines_of(J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrix of cosines and row norms of J, in longdouble."""
    wide = J.astype(LD)
    norms = np.sqrt((wide * wide).sum(axis=1))
    unit = wide / np.where(norms > 0, norms, LD(1))[:, None]
    return unit @ unit.T, norms


def solve_spd(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve A x = b for a positive semi-definite A; dependent rows get x = 0."""
    n = len(b)
    order = list(range(n))
    L = np.zeros((n, n), LD)
    left = A.diagonal().copy()
    rank = n
    for k in range(n):
        j = k + int(np.argmax(left[k:]))
        if left[j] <= LD(1e-17) * A.diagonal().max():
            rank = k
            break
        order[k], order[j] = order[j], order[k]
        left[[k, j]] = left[[j, k]]
        L[[k, j], :k] = L[[j, k], :k]
        L[k, k] = np.sqrt(left[k])
        below = order[k + 1 :]
        L[k + 1 :, k] = (A[below, order[k]] - L[k + 1 :, :k] @ L[k, :k]) / L[k, k]
        left[k + 1 :] -= L[k + 1 :, k] ** 2
    y = np.zeros(rank, LD)
    for i in range(rank):
        y[i] = (b[order[i]] - L[i, :i] @ y[:i]) / L[i, i]
    x = np.zeros(n, LD)
    for i in reversed(range(rank)):
        x[order[i]] = (y[i] - L[i + 1 : rank, i] @ x[order[i + 1 : rank]]) / L[i, i]
    return x


def solve_lcp_exactly(C: np.ndarray, q: np.ndarray) -> np.ndarray:
    """z >= 0 with C z + q >= 0 and complementarity, by Lawson and Hanson's method."""
    m = len(q)
    z = np.zeros(m, LD)
    passive: list[int] = []
    y = q.copy()
    for _ in range(30 * m):
        free = y.copy()
        free[passive] = 0
        entering = int(np.argmin(free))
        if free[entering] >= -LD(1e-17) * m * (1 + np.abs(z).max()):
            return z
        passive.append(entering)
        _advance(C, q, z, passive)
        y = C @ z + q
    raise AssertionError("the oracle did not finish")


def _advance(C: np.ndarray, q: np.ndarray, z: np.ndarray, passive: list[int]) -> None:
    """Move to the solution on the passive set, dropping indices that would become negative."""
    while passive:
        target = solve_spd(C[np.ix_(passive, passive)], -q[passive])
        if (target > 0).all():
            z[:] = 0
            z[passive] = target
            return
        here = z[passive]
        shrinking = target <= 0
        room = np.full(len(passive), LD(np.inf))
        gap = here - target
        np.divide(here, gap, out=room, where=shrinking & (gap > 0))
        room[shrinking & (gap <= 0)] = 0
        step = room.min()
        moved = here + step * (target - here)
        kept = ~(shrinking & (room <= step))
        z[:] = 0
        passive[:] = [index for index, keep in zip(passive, kept, strict=True) if keep]
        z[passive] = moved[kept]
    z[:] = 0


def project_exactly(J: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Weights v of the projections of ``references @ J`` onto the dual cone of J, in longdouble."""
    C, norms = cosines_of(J)
    inverses = np.where(norms > 0, 1 / np.where(norms > 0, norms, LD(1)), LD(0))
    projected = []
    for u in references.astype(LD):
        scaled = u * norms
        scale = np.abs(scaled).max() or LD(1)
        z = solve_lcp_exactly(C, C @ (scaled / scale))
        projected.append(u + z * scale * inverses)
    return np.array(projected)
