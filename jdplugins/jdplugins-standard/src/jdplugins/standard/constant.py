from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import ScalarizationWeighting
from jdcore.validators import row_vector


@define(eq=False)
class ConstantWeighting(ScalarizationWeighting):
    """
    Weights chosen by the user: gradient descent on a weighted sum of the losses.

    Known as linear scalarisation. It reaches only the convex part of the Pareto front, and the
    weights have to be found by search. Differentiable with respect to J.

    :param weights: Tensor [m], one weight per objective, on the device of the Jacobian.

    >>> import torch
    >>> from jdcore.aggregation import Constant
    >>> aggregator = Constant(weights=torch.tensor([1.0, 2.0]))
    >>> aggregator(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([8., 3., 3.])
    """

    weights: Tensor = field(validator=row_vector)

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        # They are constants, even if somebody made parameters of them: the update follows J alone.
        weights = self.weights.detach() if self.weights.requires_grad else self.weights
        return weights if weights.dtype == dtype else weights.to(dtype)
