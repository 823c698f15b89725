from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, islice
from math import comb, inf

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.errors import ParameterError
from jdcore.linalg import squared_distances
from jdcore.validators import integer
from jdplugins.robust._rows import average_of, require_majority

_MOST_SETS = 100_000  # some seconds
_AT_ONCE, _ENTRIES = 1024, 1 << 22  # sets, and entries of their matrices
# Of sets whose variances agree up to rounding, the first one counts.
_BETTER = 1.0 - 1e-12


@define(eq=False)
class SMEAWeighting(GramianWeighting):
    """
    Smallest maximum eigenvalue averaging: the mean of the set of rows with the least variance.

    Of all sets of ``m - n_byzantine`` rows, the one is averaged whose covariance has the smallest
    largest eigenvalue: its variance in the worst direction. From `On the
    Privacy-Robustness-Utility Trilemma in Distributed Learning
    <https://arxiv.org/pdf/2302.04787>`_.

    Choose it for the best guarantee with few rows: all ``m! / (f! (m - f)!)`` sets come into
    question, and more than 100,000 are refused. :class:`CAF <jdcore.aggregation.CAF>` needs m
    steps at most.

    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import SMEA
    >>> SMEA(n_byzantine=1)(torch.tensor([[0.0], [1.0], [2.0], [1000.0]]))
    tensor([1.])
    """

    n_byzantine: int = field(validator=integer(0))

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m, f = len(gramian), self.n_byzantine
        require_majority(m, f)
        sets = comb(m, f)
        if sets > _MOST_SETS:
            raise ParameterError(
                "n_byzantine",
                f"small enough for at most {_MOST_SETS} sets of m - n_byzantine rows",
                f"{f} of {m} rows, which leaves {sets}",
                "Choose CAF, whose time is polynomial.",
            )
        return average_of(_least_variance(gramian, m - f), m)


def _least_variance(gramian: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    # A set has at least the variance of any two of its rows, which rules out most sets with a
    # distant row before any eigenvalue is computed.
    pairs = 0.5 * squared_distances(gramian)
    centre = np.eye(size) - 1.0 / size
    least, best = inf, np.arange(size)
    for rows in _sets(len(gramian), size):
        blocks = (rows[:, :, None], rows[:, None, :])
        possible = pairs[blocks].max(axis=(1, 2)) < least
        if not possible.any():
            continue
        # Of centred rows, the Gramian has the positive eigenvalues of the scatter matrix.
        scatters = centre @ gramian[rows[possible][:, :, None], rows[possible][:, None, :]] @ centre
        variances = np.maximum(np.linalg.eigvalsh(scatters)[:, -1], 0.0)
        first = int(np.argmax(variances <= variances.min() / _BETTER))
        if variances[first] < least * _BETTER:
            least, best = float(variances[first]), rows[possible][first]
    return best


def _sets(m: int, size: int) -> Iterator[NDArray[np.int64]]:
    """All sets of rows of this size, as arrays [k, size]."""
    # In portions, as there may be more sets than memory has room for their matrices.
    every, many = combinations(range(m), size), max(1, min(_AT_ONCE, _ENTRIES // size**2))
    while portion := list(islice(every, many)):
        flat = np.fromiter(chain.from_iterable(portion), dtype=np.int64)
        yield flat.reshape(len(portion), size)
