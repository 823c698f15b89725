from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.linalg import squared_distances
from jdcore.validators import integer
from jdplugins.robust._rows import average_of, require_majority

# Squared distances that differ by less are equal but for rounding.
_EQUAL = 1e-12


@define(eq=False)
class MDAWeighting(GramianWeighting):
    """
    Minimum-diameter averaging: the mean of the ``m - n_byzantine`` rows that are closest together.

    The diameter of a set of rows is the largest distance between two of them. From `Genuinely
    Distributed Byzantine Machine Learning <https://arxiv.org/pdf/1905.03853>`_, after Rousseeuw.

    Choose it for a strong guarantee with few bad rows. The minimum is exact: the rows to leave out
    are a vertex cover of the pairs that are too far apart, which is searched in a time exponential
    in ``n_byzantine`` only, not in m. Where fewer rows than that have to go, the outermost of the
    others follow, one after the other; of several sets that come about so, the one with the least
    sum of squared distances is taken.

    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import MDA
    >>> MDA(n_byzantine=2)(torch.tensor([[0.0], [1.0], [2.0], [4.0], [1000.0]]))
    tensor([1.])
    """

    n_byzantine: int = field(validator=integer(0))

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m, f = len(gramian), self.n_byzantine
        require_majority(m, f)
        distances = squared_distances(gramian)
        # Distances that differ by rounding count as equal: rows in another order then leave the
        # same sets to choose from.
        far = distances > _least_diameter(distances, f) * (1.0 + _EQUAL)
        candidates = [_shrunk(distances, left_out, m - f) for left_out in _covers(far, f)]
        spreads = [distances[np.ix_(rows, rows)].sum() for rows in candidates]
        return average_of(candidates[int(np.argmin(spreads))], m)


def _least_diameter(distances: NDArray[np.float64], f: int) -> float:
    """The least squared diameter of a set that leaves out f rows, by bisection."""
    # The diameter of a set is one of the distances, and sets only get easier to find as it grows.
    values = np.unique(distances)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        far = distances > values[middle] * (1.0 + _EQUAL)
        if next(_covers(far, f), None) is None:
            low = middle + 1
        else:
            high = middle
    return float(values[high])


def _covers(pairs: NDArray[np.bool_], budget: int) -> Iterator[list[int]]:
    """
    Sets of at most ``budget`` rows that meet all pairs, every minimal one among them.

    :param pairs: Symmetric array [m, m].
    """
    degrees = pairs.sum(axis=1)
    # The row in most pairs: to leave it out, or not, decides most at once.
    row = int(np.argmax(degrees))
    if not degrees[row]:
        yield []
        return
    if degrees[row] * budget < degrees.sum() / 2:
        return  # that many rows cannot meet all pairs
    for rest in _covers(_without(pairs, [row]), budget - 1):
        yield [row, *rest]
    neighbours = np.flatnonzero(pairs[row]).tolist()
    if len(neighbours) <= budget:  # a cover without this row has all rows it is paired with
        for rest in _covers(_without(pairs, neighbours), budget - len(neighbours)):
            yield [*neighbours, *rest]


def _without(pairs: NDArray[np.bool_], rows: list[int]) -> NDArray[np.bool_]:
    left: NDArray[np.bool_] = pairs.copy()
    left[rows] = False
    left[:, rows] = False
    return left


def _shrunk(distances: NDArray[np.float64], left_out: list[int], size: int) -> NDArray[np.int64]:
    """All other rows, without the outermost ones if they are still too many."""
    kept = np.delete(np.arange(len(distances)), left_out)
    while len(kept) > size:
        outermost = int(np.argmax(distances[np.ix_(kept, kept)].sum(axis=1)))
        kept = np.delete(kept, outermost)
    return kept
