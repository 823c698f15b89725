"""Whether losses are so near Pareto stationarity that float32 products are too coarse."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from jdcore.linalg import cholesky

# Products of float32 are wrong by about 1e-7 of the lengths of two rows. Where no combination of
# rows of length one is shorter than the root of this, that is 1e-4 of the Gramian in any direction.
_SMALLEST = 1e-3


def rows_cancel(gramian: Tensor) -> bool:
    """
    Whether some combination of the rows, scaled to one length, nearly vanishes.

    :param gramian: Shape [m, m], float64. It is read, which waits for an accelerator.
    """
    # That G - s D is definite, with D the diagonal of G, says that all eigenvalues of the cosines
    # are above s.
    matrix = gramian.cpu().numpy()
    shifted = matrix.copy()
    squares = shifted.reshape(-1)[:: len(matrix) + 1]
    squares *= 1.0 - _SMALLEST
    squares[~(squares > 0.0)] = 1.0  # a row that is zero cancels nothing
    try:
        # Positive definite, and so factored, is what has no eigenvalue below the limit; that costs
        # a fraction of the eigenvalues.
        cholesky(shifted)
    except np.linalg.LinAlgError:
        return bool(np.isfinite(matrix).all())  # else whatever the precision
    return False
