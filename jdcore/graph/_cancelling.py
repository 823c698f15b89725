"""Whether losses are so near Pareto stationarity that float32 products are too coarse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jdcore.linalg import cholesky

# Products of float32 are wrong by about 1e-7 of the lengths of two rows. Where no combination of
# rows of length one is shorter than the root of this, that is 1e-4 of the Gramian in any direction.
_SMALLEST = 1e-3

# Losses up to which the Gramian is multiplied in float64 where their rows nearly cancel: there its
# smallest eigenvalues matter, which float32 products drown in their rounding. For more losses that
# would cost more than the backward pass.
_FEW = 64


def may_need_float64(rows: int, precision: torch.dtype) -> bool:
    """
    Whether a Gramian is to be multiplied in float64 if its rows nearly cancel.

    :param precision: What the rows were rounded to.
    """
    return rows <= _FEW and precision != torch.float64


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
