from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore import ParameterError
from jdcore.aggregation import GramianWeighting
from jdcore.linalg import equilibrate
from jdcore.validators import boolean, integer


@define(eq=False)
class GradientSimilarityWeighting(GramianWeighting):
    """
    The main row, plus every other row weighted by its cosine with it where that is positive.

    ``w_main = 1`` and ``w_i = max(0, cos(g_i, g_main))``. The update never conflicts with the main
    row and is zero only where that is zero, so training converges to critical points of the main
    loss. From `Adapting Auxiliary Losses Using Gradient Similarity
    <https://arxiv.org/pdf/1812.02224>`_, which has one auxiliary loss; several are judged one by
    one, so they may conflict with each other.

    Choose it when the other losses are a means and not an end. Scale them beforehand: the cosine
    says whether an auxiliary gradient helps, not how much of it is wanted.

    :param main: Index of the main objective.
    :param hard: Whether helpful rows count in full (weight 1 for a cosine that is not negative).
        This is the paper's unweighted version.

    >>> import torch
    >>> from jdcore.aggregation import GradientSimilarity
    >>> GradientSimilarity()(torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 9.0]]))
    tensor([2.8000, 2.4000])
    """

    main: int = field(default=0, validator=integer(0))
    hard: bool = field(default=False, validator=boolean)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.main >= len(gramian):
            raise ParameterError("main", f"< {len(gramian)}, the number of objectives", self.main)
        cosines = equilibrate(gramian)[0][self.main]
        weights = (cosines >= 0.0).astype(np.float64) if self.hard else cosines.clip(min=0.0)
        weights[self.main] = 1.0
        return weights
