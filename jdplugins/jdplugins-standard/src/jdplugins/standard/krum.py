from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.errors import ParameterError
from jdcore.linalg import lowest, squared_distances
from jdcore.validators import boolean, integer


@define(eq=False)
class KrumWeighting(GramianWeighting):
    """
    Robust selection: the mean of the rows that lie closest to their neighbours.

    The score of a row is the sum of its distances to the ``m - n_byzantine - 2`` rows nearest to
    it. The rows with the lowest scores are averaged. From `Machine Learning with Adversaries:
    Byzantine Tolerant Gradient Descent
    <https://proceedings.neurips.cc/paper/2017/file/f4b9ec30ad9f68f89b29639786cb62ef-Paper.pdf>`_;
    several selected rows are its Multi-Krum.

    Choose it in distributed training when up to ``n_byzantine`` workers may send anything. It needs
    at least ``n_byzantine + 3`` rows; the guarantee of the paper needs ``2 n_byzantine + 3``. Of
    rows with equal scores, up to rounding, the first ones are taken: the result may then depend on
    their order, as that of two rows which are each other's nearest neighbours does.

    :param n_byzantine: Number of rows that may be adversarial.
    :param n_selected: Number of rows to average.
    :param squared: Whether squared distances are added up, as in the paper. The default adds up
        distances, as other libraries do; the selection can differ.
    :raises ParameterError: At a call, for fewer rows than ``n_byzantine + 3`` or ``n_selected``.

    >>> import torch
    >>> from jdcore.aggregation import Krum
    >>> Krum(n_byzantine=1)(torch.tensor([[1.0], [2.0], [3.0], [5.0], [1000.0]]))
    tensor([2.])
    """

    n_byzantine: int = field(validator=integer(0))
    n_selected: int = field(default=1, validator=integer(1))
    squared: bool = field(default=False, validator=boolean)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        self._check_rows(m)
        neighbours = m - self.n_byzantine - 2
        distances = squared_distances(gramian)
        if not self.squared:
            np.sqrt(distances, out=distances)
        # Each row is its own nearest neighbour, at distance 0.
        nearest = np.partition(distances, neighbours, axis=1)[:, : neighbours + 1]
        weights = np.zeros(m)
        weights[lowest(nearest.sum(axis=1), self.n_selected)] = 1.0 / self.n_selected
        return weights

    def _check_rows(self, m: int) -> None:
        needed = {"n_byzantine + 3": self.n_byzantine + 3, "n_selected": self.n_selected}
        for why, least in needed.items():
            if m < least:
                raise ParameterError("gramian", f"of at least {least} rows ({why})", f"{m} rows")
