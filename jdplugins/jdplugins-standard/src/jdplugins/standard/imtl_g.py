from __future__ import annotations

import numpy as np
from attrs import define
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, GramianWeighting
from jdcore.errors import JDCoreWarning, warn
from jdcore.linalg import equilibrate
from jdplugins.standard._spectrum import pseudo_solve

_ZERO = 1e-12  # of shares of unit rows, and of their sum beside its terms
_NO_SUM = "IMTL-G has no solution whose weights sum to 1 here; all weights are 0."


@define(eq=False)
class IMTLGWeighting(GramianWeighting):
    """
    Impartial gradients: the update has the same projection onto the direction of every row.

    The weights w sum to 1, and ``g_i · (Jᵀ w) / |g_i|`` is the same for every i: with C the matrix
    of cosines and D the row norms, w is proportional to ``D⁻¹ C⁻¹ 1``. From `Towards Impartial
    Multi-task Learning <https://discovery.ucl.ac.uk/id/eprint/10120667/>`_.

    Choose it when no objective shall dominate through its scale. Weights may be negative, and the
    common projection as well: the update may then conflict with all objectives.

    Where rows are dependent, the projections are equal in the least-squares sense. Zero rows get
    weight zero. Where the solution has weights that sum to 0, they cannot be made to sum to 1:
    all weights are then 0, with a :class:`~jdcore.JDCoreWarning`.

    >>> import torch
    >>> from jdcore.aggregation import IMTLG
    >>> IMTLG()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([0.7500, 0.7500])
    """

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        cosines, norms, inverses = equilibrate(gramian)
        shares = pseudo_solve(cosines, (norms > 0.0).astype(np.float64), source.proximal_level)
        if np.abs(shares).max() <= _ZERO:
            return np.zeros_like(shares)  # 0 is the only vector with equal projections
        weights = shares * inverses
        total = weights.sum()
        if abs(total) <= _ZERO * np.abs(weights).sum():
            warn(JDCoreWarning(_NO_SUM))
            return np.zeros_like(shares)
        weights /= total
        return weights
