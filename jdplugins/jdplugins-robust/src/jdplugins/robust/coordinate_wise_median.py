from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator


@define(eq=False)
class CoordinateWiseMedian(CoordinatewiseAggregator):
    """
    Median of each coordinate; the mean of the two middle entries for an even number of rows.

    From `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    <https://proceedings.mlr.press/v80/yin18a/yin18a.pdf>`_.

    Choose it when any minority of the rows may be anything and its size is not known. It sees
    single coordinates: it is an aggregator only, not a weighting of the Gramian.

    >>> import torch
    >>> from jdcore.aggregation import CoordinateWiseMedian
    >>> CoordinateWiseMedian()(torch.tensor([[1.0, 9.0], [2.0, 5.0], [600.0, 4.0]]))
    tensor([2., 5.])
    """

    def compute(self, columns: Tensor) -> Tensor:
        m = len(columns)
        ordered = columns.T.contiguous().sort(dim=1).values
        return ordered[:, (m - 1) // 2 : m // 2 + 1].mean(dim=1, dtype=torch.float64)
