from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def squared_distances(gramian: NDArray[np.float64], /) -> NDArray[np.float64]:
    """
    Squared distances ``‖x_i - x_j‖² = G_ii + G_jj - 2 G_ij`` between the rows of a Jacobian.

    The difference cancels: two rows that agree to k digits have a distance with 16 - 2k digits. For
    rows of float32 or narrower, that is all that their own rounding leaves.

    :param gramian: Finite float64 array [m, m].
    :returns: float64 array [m, m], symmetric, without negative entries, and zero on the diagonal.

    >>> import numpy as np
    >>> squared_distances(np.array([[1.0, 2.0], [2.0, 4.0]]))  # of the rows 1 and 2
    array([[0., 1.],
           [1., 0.]])
    """
    squared_norms = np.diagonal(gramian)
    distances = squared_norms[:, None] + squared_norms
    distances -= 2.0 * gramian
    np.maximum(distances, 0.0, out=distances)  # rounding can leave small negative numbers
    distances.reshape(-1)[:: len(gramian) + 1] = 0.0
    return distances
