from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from jdcore.aggregation import ScalarizationWeighting, equal_weights


@define(eq=False)
class MeanWeighting(ScalarizationWeighting):
    """
    Equal weights 1/m: the update is the gradient of the mean of the losses.

    The baseline every other method is compared with. Two objectives in conflict can make the mean
    increase one of them.

    >>> import torch
    >>> from jdcore.aggregation import Mean
    >>> Mean()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([1., 1., 1.])
    """

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return equal_weights(1.0 / m, m, dtype)
