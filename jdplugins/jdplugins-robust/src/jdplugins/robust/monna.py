from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.linalg import lowest, squared_distances
from jdcore.validators import integer
from jdplugins.robust._rows import average_of, require_majority, require_rows


@define(eq=False)
class MoNNAWeighting(GramianWeighting):
    """
    Nearest-neighbour averaging: the mean of the rows closest to one row that is trusted.

    ``m - n_byzantine`` rows are averaged, the trusted one among them. From `Robust Collaborative
    Learning with Linear Gradient Overhead <https://arxiv.org/pdf/2209.10931>`_.

    Choose it where one gradient is known to be honest, such as that of the worker itself when
    workers exchange gradients without a server. Of rows equally far away the first ones are taken.

    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.
    :param trusted: Index of the trusted row.

    >>> import torch
    >>> from jdcore.aggregation import MoNNA
    >>> MoNNA(n_byzantine=1, trusted=1)(torch.tensor([[1.0], [2.0], [6.0]]))
    tensor([1.5000])
    """

    n_byzantine: int = field(validator=integer(0))
    trusted: int = field(default=0, validator=integer(0))

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        require_majority(m, self.n_byzantine)
        # Whether the trusted row exists is known only now.
        require_rows(m, self.trusted + 1, "trusted + 1")
        distances = squared_distances(gramian)[self.trusted]
        distances[self.trusted] = -1.0  # comes first, whatever coincides with it
        return average_of(lowest(distances, m - self.n_byzantine), m)
