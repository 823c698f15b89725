from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def equilibrate(
    gramian: NDArray[np.float64], /
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """
    Split a Gramian as ``G = D C D``, with D the diagonal matrix of the row norms.

    Solvers work on C, the matrix of cosines, so the scale of each row leaves the problem exactly.
    The diagonal of C is set to exactly 1 (0 for zero rows).

    :param gramian: float64 array [m, m].
    :returns: C [m, m], the norms [m], and their inverses [m] (0 for zero rows).
    """
    m = len(gramian)
    norms = np.sqrt(gramian.diagonal())
    nonzero = norms > 0.0
    inverses = np.zeros(m)
    np.divide(1.0, norms, out=inverses, where=nonzero)
    # Two products rather than one with the outer product, which would overflow for tiny norms.
    cosines = gramian * inverses[:, None]
    cosines *= inverses
    # Rounding would leave 1 - 1e-16 in some places, which factorisations take for a difference.
    cosines.flat[:: m + 1] = nonzero
    return cosines, norms, inverses
