from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianSource, GramianWeighting, row_weights
from jdcore.linalg import equilibrate
from jdcore.validators import row_vector
from jdplugins.standard._spectrum import pseudo_solve


@define(eq=False)
class ConFIGWeighting(GramianWeighting):
    """
    Conflict-free inverse gradients: equal cosines with all rows, and the length they add up to.

    The direction is that of ``Uᵀ (U Uᵀ)⁻¹ p``, where U holds the rows scaled to length 1: its
    inner products with the rows of U are proportional to p. The length is the sum of the
    projections of all rows onto it. From `ConFIG: Towards Conflict-free Training of Physics
    Informed Neural Networks <https://arxiv.org/pdf/2408.11104>`_.

    Choose it when all objectives shall advance at the same rate, up to their scales. It conflicts
    with no row if the rows are independent (and p > 0); if not, the inner products are proportional
    to p in the least-squares sense, and some may be negative.

    Only the Gramian is needed: with C the matrix of cosines and D the row norms, the weights are
    proportional to ``D⁻¹ C⁺ p``. Zero rows get weight zero.

    :param pref_vector: Preferences p, Tensor [m]; 1 each if None. Only ratios matter.

    >>> import torch
    >>> from jdcore.aggregation import ConFIG
    >>> ConFIG()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([2., 2.])
    """

    pref_vector: Tensor | None = field(default=None, validator=row_vector)

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        m = len(gramian)
        cosines, norms, inverses = equilibrate(gramian)
        preferences = np.ones(m) if self.pref_vector is None else _ratios(self.pref_vector, m)
        # Of unit rows, or a short row would count as one that nearly depends on the others.
        direction = pseudo_solve(cosines, preferences, source.proximal_level)
        projections = cosines @ direction
        squared = float(direction @ projections)
        if not squared > 0.0:
            return np.zeros(m)
        weights: NDArray[np.float64] = direction * inverses * (float(norms @ projections) / squared)
        return weights


def _ratios(preferences: Tensor, m: int) -> NDArray[np.float64]:
    """Preferences relative to the largest one, as the squares of any others may leave the range."""
    weights = row_weights(preferences, m)
    largest = float(np.abs(weights).max())
    return weights / largest if largest else weights
