from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from jdcore.aggregation import ScalarizationWeighting, equal_weights


@define(eq=False)
class SumWeighting(ScalarizationWeighting):
    """
    Weights 1: the update is the gradient of the sum of the losses.

    It differs from :class:`Mean <jdcore.aggregation.Mean>` by the factor m, so the learning rate
    has to follow the number of objectives. Differentiable with respect to J.

    >>> import torch
    >>> from jdcore.aggregation import Sum
    >>> Sum()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([2., 2., 2.])
    """

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return equal_weights(1.0, m, dtype)
