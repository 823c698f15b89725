from __future__ import annotations

import numpy as np
from attrs import define, field
from attrs.validators import optional
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.linalg import lowest, squared_distances
from jdcore.validators import integer
from jdplugins.robust._rows import average_of, require_rows


@define(eq=False)
class MultiKrumWeighting(GramianWeighting):
    """
    Mean of the rows that lie closest to their neighbours, as many as can be honest.

    The score of a row is the sum of its squared distances to the ``m - n_byzantine - 2`` rows
    nearest to it, and the ``n_selected`` rows with the lowest scores are averaged. From `Machine
    Learning with Adversaries: Byzantine Tolerant Gradient Descent
    <https://proceedings.neurips.cc/paper/2017/file/f4b9ec30ad9f68f89b29639786cb62ef-Paper.pdf>`_.

    Choose it over :class:`Krum <jdcore.aggregation.Krum>`, which follows a single row, to average
    all rows that are not suspicious. The guarantee of the paper needs ``2 n_byzantine + 3`` rows.
    Of rows with equal scores, up to rounding, the first ones are taken.

    :param n_byzantine: Number of rows that may be adversarial; at least ``n_byzantine + 3`` rows
        are needed.
    :param n_selected: Number of rows to average. None stands for ``m - n_byzantine``.

    >>> import torch
    >>> from jdcore.aggregation import MultiKrum
    >>> MultiKrum(n_byzantine=1)(torch.tensor([[1.0], [2.0], [3.0], [6.0], [1000.0]]))
    tensor([3.])
    """

    n_byzantine: int = field(validator=integer(0))
    n_selected: int | None = field(default=None, validator=optional(integer(1)))

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m, f = len(gramian), self.n_byzantine
        require_rows(m, f + 3, "n_byzantine + 3")
        selected = m - f if self.n_selected is None else self.n_selected
        require_rows(m, selected, "n_selected")
        # Each row is its own nearest neighbour, at distance 0.
        nearest = np.partition(squared_distances(gramian), m - f - 2, axis=1)[:, : m - f - 1]
        return average_of(lowest(nearest.sum(axis=1), selected), m)
