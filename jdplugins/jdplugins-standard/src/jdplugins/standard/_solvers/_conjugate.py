"""
The LCP for large m and many right-hand sides, by block pivoting on conjugate gradients.

The subproblems of all right-hand sides are solved together: a step of masked conjugate gradients is
one product with C for all of them, which runs at the full speed of a matrix product where
factorising every passive block would not. Early pivots need signs only, so they are solved loosely.
"""

from __future__ import annotations

import numpy as np

from jdcore.linalg import product
from jdplugins.standard._solvers._accuracy import (
    Floats,
    Indices,
    Mask,
    infeasible,
    pivot_tolerance,
)

_CHUNK = 64  # right-hand sides at a time: their vectors stay in cache
_MAX_PIVOTS = 12
_MAX_STEPS = 40
_LOOSEST, _LOOSE, _TIGHT = 1e-2, 1e-6, 2e-15
_TIGHT_PIVOT = 3  # from this pivot on, every subproblem is solved tightly
_HOPELESS = 1e-2  # norm of the residual after all steps that tells an ill-conditioned block
_DONE = 1e-12
_DAMPING = 1e-10  # keeps the curvature positive on dependent rows
_TINY = 1e-300  # avoids 0 / 0 for right-hand sides that are solved already


def solve_conjugate(C: Floats, Q: Floats) -> tuple[Floats, Mask, Mask]:
    """
    Solve the LCPs of those rows of Q whose passive blocks are well conditioned.

    :param C: Unit-diagonal positive semi-definite matrix [m, m].
    :param Q: Vectors q [k, m].
    :returns: Solutions Z [k, m], which rows are solved [k], and the last passive sets [k, m], a
        start for another method where they are not.
    """
    F = infeasible(Q)
    Z = np.zeros_like(Q)
    solved: Mask = np.logical_not(F.any(axis=1))
    rows = np.flatnonzero(~solved)
    for start in range(0, rows.size, _CHUNK):
        _solve_chunk(C, Q, F, Z, solved, rows[start : start + _CHUNK])
    return Z, solved, F


def _solve_chunk(C: Floats, Q: Floats, F: Mask, Z: Floats, solved: Mask, rows: Indices) -> None:
    """Solve some of the rows, writing to F, Z and ``solved``."""
    q, f = Q[rows], F[rows]
    z = np.zeros_like(q)
    tolerance = _LOOSEST
    for pivot in range(_MAX_PIVOTS):
        mask = f.astype(np.float64)
        z *= mask
        largest = _conjugate_gradients(C, q, mask, z, tolerance)
        if largest > _HOPELESS and pivot > 0:
            break
        y = product(z, C)
        y += q
        left = np.abs(y * mask).max(axis=1)
        y += pivot_tolerance(len(C)) * (1.0 + np.abs(z).max(axis=1, keepdims=True))
        bad = np.where(f, z, y) < 0.0
        count = bad.sum(axis=1)
        if tolerance == _TIGHT:
            done = (count == 0) & (left <= _DONE)
            Z[rows[done]] = z[done]
            solved[rows[done]] = True
            rows, q, f, z, bad = (array[~done] for array in (rows, q, f, z, bad))
            if rows.size == 0 or largest > tolerance:
                break
        f ^= bad
        tight = count.max() <= 2 or pivot >= _TIGHT_PIVOT
        tolerance = _TIGHT if tight else max(tolerance * 1e-2, _LOOSE)
    F[rows] = f


def _conjugate_gradients(C: Floats, q: Floats, mask: Floats, z: Floats, tolerance: float) -> float:
    """
    Iterate z towards ``C_FF z_F = -q_F`` in every row, in place.

    :returns: The largest norm of a residual.
    """
    residual = -q
    residual -= product(z, C)
    residual *= mask
    direction = residual.copy()
    squared = np.einsum("ij,ij->i", residual, residual)
    for _ in range(_MAX_STEPS):
        if squared.max() <= tolerance * tolerance:
            break
        image = product(direction, C)
        image *= mask
        image += _DAMPING * direction
        curvature = np.einsum("ij,ij->i", direction, image)
        if (curvature < 0.0).any():  # C is not semi-definite: leave it to another method
            return np.inf
        step = (squared / np.maximum(curvature, _TINY))[:, None]
        z += step * direction
        image *= step
        residual -= image
        before = squared
        squared = np.einsum("ij,ij->i", residual, residual)
        direction *= (squared / np.maximum(before, _TINY))[:, None]
        direction += residual
    return float(np.sqrt(squared.max()))
