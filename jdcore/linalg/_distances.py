from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Scores that differ by less, relative to their size, differ by rounding.
_EQUAL = 1e-12


def lowest(scores: NDArray[np.float64], count: int, /) -> NDArray[np.intp]:
    """
    Indices of the lowest of some scores; of those that differ by rounding only, the first ones.

    Sums of the same numbers in another order, as of rows in another order, give the same choice.

    :param scores: float64 array [m].
    :param count: How many, from 1 to m.
    :returns: Integer array [count].

    >>> import numpy as np
    >>> lowest(np.array([3.0, 0.1 + 0.2, 1.0, 0.3]), 1)
    array([1])
    """
    last = float(np.partition(scores, count - 1)[count - 1])
    if not np.isfinite(last):  # nothing differs from that by rounding
        return np.argsort(scores, kind="stable")[:count]
    margin = _EQUAL * abs(last)
    chosen: NDArray[np.intp] = (scores <= last + margin).nonzero()[0]
    if len(chosen) == count:
        return chosen
    lower = (scores < last - margin).nonzero()[0]
    tied = chosen[scores[chosen] >= last - margin]
    return np.concatenate([lower, tied[: count - len(lower)]])


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
