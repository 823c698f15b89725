from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.validators import integer
from jdplugins.robust._rows import require_majority


@define(eq=False)
class MeaMed(CoordinatewiseAggregator):
    """
    Mean around the median: of each coordinate, the mean of the entries closest to its median.

    ``m - n_byzantine`` entries are averaged. From `Generalized Byzantine-tolerant SGD
    <https://arxiv.org/pdf/1802.10116>`_.

    Choose it over :class:`CoordinateWiseMedian <jdcore.aggregation.CoordinateWiseMedian>` when the
    number of bad rows is known: it averages more entries, so its update is less noisy. Of entries
    equally far from the median on both sides, the smaller ones are kept. It sees single
    coordinates: it is an aggregator only, not a weighting of the Gramian.

    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import MeaMed
    >>> MeaMed(n_byzantine=1)(torch.tensor([[1.0], [2.0], [4.0], [5.0], [1000.0]]))
    tensor([3.])
    """

    n_byzantine: int = field(validator=integer(0))

    def check_rows(self, m: int) -> None:
        """
        Refuse fewer than ``2 n_byzantine + 1`` rows.

        :param m: Number of rows.
        :raises ParameterError: If there are too few.
        """
        require_majority(m, self.n_byzantine, "matrix")

    def compute(self, columns: Tensor) -> Tensor:
        m, f = len(columns), self.n_byzantine
        ordered = columns.double().T.contiguous().sort(dim=1).values
        # The one in the middle, or the mean of both.
        median = ordered[:, (m - 1) // 2 : m // 2 + 1].mean(dim=1, keepdim=True)
        # Those closest to the median are neighbours in this order: one of f + 1 windows.
        lowest, highest = ordered[:, : f + 1], ordered[:, m - f - 1 :]
        first = torch.maximum(median - lowest, highest - median).argmin(dim=1, keepdim=True)
        kept = first + torch.arange(m - f, device=columns.device)
        return ordered.gather(1, kept).mean(dim=1)
