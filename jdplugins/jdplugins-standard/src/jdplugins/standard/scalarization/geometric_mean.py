from __future__ import annotations

from attrs import define
from torch import Tensor

from jdcore.scalarization import LossScalarizer, require_above


@define(eq=False)
class GeometricMean(LossScalarizer):
    """
    Geometric mean of the losses, ``(Π L_i)^(1/m)``, known as GLS.

    From `MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning <https://arxiv.org/pdf/1904.08492>`_.

    Choose it for positive losses of different scales: a factor on one loss changes nothing but the
    length of the gradient.

    >>> import torch
    >>> from jdcore.scalarization import GeometricMean
    >>> GeometricMean()(torch.tensor([1.0, 4.0]))
    tensor(2.)
    """

    def scalarize(self, losses: Tensor) -> Tensor:
        require_above(losses, 0.0)
        return losses.log().mean().exp()  # the product itself could leave the range of the dtype
