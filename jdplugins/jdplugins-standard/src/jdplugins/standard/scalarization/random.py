from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.scalarization import WeightedSum
from jdcore.validators import generator
from jdplugins.standard.random import RandomWeighting


@define(eq=False)
class Random(WeightedSum):
    """
    Weighted sum of the losses, with positive random weights drawn anew at each call.

    The weights are the softmax of m independent standard normal numbers. From `Reasonable
    Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
    <https://arxiv.org/pdf/2111.10603>`_.

    :param generator: Source of the random numbers, on any device; the default generator of torch if
        None.

    >>> import torch
    >>> from jdcore.scalarization import Random
    >>> Random(generator=torch.Generator().manual_seed(0))(torch.tensor([2.0, 2.0]))
    tensor(2.)
    """

    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )

    def weights(self, m: int, dtype: torch.dtype) -> Tensor:
        return RandomWeighting(generator=self.generator).compute(m, dtype)
