from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from jdcore.scalarization import WeightedSum
from jdplugins.standard.sum import SumWeighting


@define(eq=False)
class Sum(WeightedSum):
    """
    Sum of the losses, known as equal weighting.

    >>> import torch
    >>> from jdcore.scalarization import Sum
    >>> Sum()(torch.tensor([1.0, 4.0]))
    tensor(5.)
    """

    def weights(self, m: int, dtype: torch.dtype) -> Tensor:
        return SumWeighting().compute(m, dtype)
