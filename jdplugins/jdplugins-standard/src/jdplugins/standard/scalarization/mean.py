from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from jdcore.scalarization import WeightedSum
from jdplugins.standard.mean import MeanWeighting


@define(eq=False)
class Mean(WeightedSum):
    """
    Mean of the losses: the baseline every other method is compared with.

    >>> import torch
    >>> from jdcore.scalarization import Mean
    >>> Mean()(torch.tensor([1.0, 4.0]))
    tensor(2.5000)
    """

    def weights(self, m: int, dtype: torch.dtype) -> Tensor:
        return MeanWeighting().compute(m, dtype)
