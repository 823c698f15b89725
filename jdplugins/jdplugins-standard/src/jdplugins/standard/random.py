from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import ScalarizationWeighting
from jdcore.validators import generator


@define(eq=False)
class RandomWeighting(ScalarizationWeighting):
    """
    Positive random weights that sum to 1, drawn anew at each call.

    The weights are the softmax of m independent standard normal numbers. From `Reasonable
    Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
    <https://arxiv.org/pdf/2111.10603>`_.

    The baseline a new method has to beat: it often does no worse than elaborate ones.
    Differentiable with respect to J.

    :param generator: Source of the random numbers, on any device; the default generator of torch if
        None.

    >>> import torch
    >>> from jdcore.aggregation import Random
    >>> aggregator = Random(generator=torch.Generator().manual_seed(0))
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).sum()
    tensor(1.)
    """

    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        # torch draws on the device of the generator only.
        device = "cpu" if self.generator is None else self.generator.device
        normal = torch.randn(m, generator=self.generator, dtype=dtype, device=device)
        return normal.softmax(0)
