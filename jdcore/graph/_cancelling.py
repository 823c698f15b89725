"""Whether losses are so near Pareto stationarity that float32 products are too coarse."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from jdcore.linalg import cholesky, equilibrate

# Products of float32 are wrong by about 1e-7 of the lengths of two rows. Where no combination of
# rows of length one is shorter than the root of this, that is 1e-4 of the Gramian in any direction.
_SMALLEST = 1e-3


def rows_cancel(gramian: Tensor) -> bool:
    """
    Whether some combination of the rows, scaled to one length, nearly vanishes.

    :param gramian: Shape [m, m], float64. It is read, which waits for an accelerator.
    """
    matrix = gramian.cpu().numpy()
    there = matrix.diagonal() > 0.0  # what is zero cancels nothing
    matrix = matrix[np.ix_(there, there)]
    if not np.isfinite(matrix).all():
        return False  # whatever the precision
    shifted, _, _ = equilibrate(matrix)
    shifted[np.diag_indices(len(shifted))] -= _SMALLEST
    try:
        # Positive definite, and so factored, is what has no eigenvalue below the limit; that costs
        # a fraction of the eigenvalues.
        cholesky(shifted)
    except np.linalg.LinAlgError:
        return True
    return False
