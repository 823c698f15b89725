from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, RowMixing, finite_gramian
from jdcore.linalg import lowest, squared_distances
from jdcore.validators import integer
from jdplugins.robust._rows import average_of, require_majority


@define(eq=False)
class NNM(RowMixing):
    """
    Nearest-neighbour mixing: each row becomes the mean of the rows closest to it.

    A row and the ``m - n_byzantine - 1`` rows nearest to it are averaged, and another aggregator
    has the last word. From `Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity
    <https://arxiv.org/pdf/2302.01772>`_.

    Choose it around any robust aggregator when honest rows differ among themselves: it takes the
    guarantee of the wrapped method to the optimal order. Of rows equally far away the first ones
    are taken.

    :param aggregator: What aggregates the mixed rows.
    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import CoordinateWiseMedian, NNM
    >>> NNM(CoordinateWiseMedian(), n_byzantine=1)(torch.tensor([[0.0], [1.0], [9.0]]))
    tensor([0.5000])
    """

    n_byzantine: int = field(validator=integer(0), kw_only=True)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        m = source.rows
        require_majority(m, self.n_byzantine)
        distances = squared_distances(finite_gramian(source))
        np.fill_diagonal(distances, -1.0)  # a row comes first, whatever coincides with it
        kept = m - self.n_byzantine
        return np.stack([average_of(lowest(each, kept), m) for each in distances])
