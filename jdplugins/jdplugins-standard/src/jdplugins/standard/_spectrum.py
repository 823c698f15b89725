from __future__ import annotations

import math

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdcore.linalg import cholesky, eigh, solve

# Eigenvalues below 64 m eps of the largest are rounding of the Gramian, and those below four times
# the proximal level of the rows that make up their eigenvector are rounding of these rows.
_RANK_TOLERANCE = 64.0 * np.finfo(np.float64).eps
_ROUNDED = 4.0

# Rows whose part orthogonal to the rows before is at least this long are solved for directly.
_REGULAR_PIVOT = 1e-2


@frozen
class Spectrum:
    """
    Eigendecomposition of a positive semi-definite matrix, without its numerical null space.

    :param values: Positive eigenvalues [r], ascending.
    :param vectors: Their eigenvectors [m, r].
    :param null_space: Orthonormal basis of the null space [m, m - r].
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    null_space: NDArray[np.float64]

    def pseudo_solve(self, right: NDArray[np.float64]) -> NDArray[np.float64]:
        """Least-squares solution of least norm for a right-hand side [m] or several [m, k]."""
        # Dividing in this order keeps rows and columns apart for both shapes.
        coordinates: NDArray[np.float64] = ((right.T @ self.vectors) / self.values).T
        return self.vectors @ coordinates


def pseudo_solve(
    matrix: NDArray[np.float64], right: NDArray[np.float64], level: float
) -> NDArray[np.float64]:
    """
    Least-squares solution z of least norm of ``matrix @ z = right``, zero where that is rounding.

    :param matrix: Positive semi-definite matrix of cosines [m, m].
    :param right: Vector [m].
    :param level: See :func:`spectrum`.
    """
    if _is_regular(matrix, level):
        return solve(matrix, right)
    components = spectrum(matrix, level)
    # What mixes an eigenvector with the null space is what the rows are known to, relative to its
    # singular value. Where all of ``right`` in the range may come from there, nothing is left.
    shares = (right @ components.vectors) ** 2 * components.values
    if shares.max(initial=0.0) <= max(level, _RANK_TOLERANCE * len(matrix)) * float(right @ right):
        return np.zeros_like(right)
    return components.pseudo_solve(right)


def _is_regular(matrix: NDArray[np.float64], level: float) -> bool:
    """Whether :func:`spectrum` would keep all eigenvalues, told by less than all of these."""
    try:
        factor = cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    m, pivots = len(matrix), np.diagonal(factor)
    # Pivots depend on the order of the rows, so they alone must not decide: what they say for one
    # order has to hold for all.
    if pivots.min(initial=1.0) <= _REGULAR_PIVOT:
        return False
    limit = max(_ROUNDED * level, _RANK_TOLERANCE * m * m)
    # The smallest eigenvalue of a matrix with a unit diagonal is above its determinant by e, since
    # the mean of the others is at most m / (m - 1); and above the reciprocal of the trace of the
    # inverse.
    if math.exp(2.0 * float(np.log(pivots).sum()) - 1.0) > limit:
        return True
    inverse = np.linalg.inv(factor)
    return bool(np.vdot(inverse, inverse) * limit < 1.0)


def spectrum(matrix: NDArray[np.float64], /, level: float | NDArray[np.float64] = 0.0) -> Spectrum:
    """
    Eigenvalues that are not rounding, their eigenvectors, and a basis of the null space.

    :param matrix: Positive semi-definite float64 array [m, m].
    :param level: What counts as rounding of the rows, see :func:`jdcore.linalg.proximal_level`, for
        all of them or for each [m].
    """
    values, vectors = eigh(matrix)
    noise = _ROUNDED * level * matrix.diagonal()
    rounding = _RANK_TOLERANCE * len(matrix) * values[-1]
    # No mean of the noise of the rows is above the largest one. Nearly always, that suffices.
    if values[0] > max(float(noise.max()), rounding):
        return Spectrum(values, vectors, vectors[:, :0])
    kept = values > np.maximum(noise @ (vectors * vectors), rounding)
    return Spectrum(values[kept], vectors[:, kept], vectors[:, ~kept])
