from __future__ import annotations

from attrs import define, field
from torch import Tensor

from jdcore.scalarization import LossScalarizer
from jdcore.validators import row_vector


@define(eq=False)
class Constant(LossScalarizer):
    """
    Weighted sum of the losses, with weights chosen by the user.

    Known as linear scalarisation. It reaches only the convex part of the Pareto front.

    :param weights: Tensor [m], one weight per loss, on the device of the losses.

    >>> import torch
    >>> from jdcore.scalarization import Constant
    >>> Constant(torch.tensor([2.0, 1.0]))(torch.tensor([1.0, 4.0]))
    tensor(6.)
    """

    weights: Tensor = field(validator=row_vector)

    def scalarize(self, losses: Tensor) -> Tensor:
        return self.weights.detach().to(losses.dtype) @ losses
