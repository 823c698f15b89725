from __future__ import annotations

from typing import Literal

import numpy as np
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianSource, GramianWeighting, row_weights
from jdcore.validators import one_of, row_vector
from jdplugins.standard._spectrum import spectrum


@define(eq=False)
class AlignedMTLWeighting(GramianWeighting):
    """
    Alignment of the principal components of J: all its singular values are made equal.

    With ``G = V Λ Vᵀ`` over the positive eigenvalues, the weights are ``√λ V Λ^(-1/2) Vᵀ p``, where
    λ is the common eigenvalue chosen by ``scale_mode``: the update is ``p`` applied to the nearest
    matrix with orthogonal principal components of equal length. From `Independent Component
    Alignment for Multi-Task Learning <https://arxiv.org/pdf/2305.19000>`_.

    Choose it against both conflict and dominance when the number of objectives is well below the
    number of parameters. With ``"min"``, a Jacobian whose rank is almost deficient gives a short
    update, which jumps where the smallest eigenvalue becomes zero to working precision (1e-14 m of
    the largest).

    :param pref_vector: Preferences p, Tensor [m]; 1/m each if None.
    :param scale_mode: The common eigenvalue: the smallest (``"min"``), the lower median
        (``"median"``) or the mean (``"rmse"``, as its root is that of the mean squared singular
        value) of the positive ones.

    >>> import torch
    >>> from jdcore.aggregation import AlignedMTL
    >>> AlignedMTL()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 0.5000])
    """

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    scale_mode: Literal["min", "median", "rmse"] = field(
        default="min", validator=one_of("min", "median", "rmse")
    )

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        preferences = row_weights(self.pref_vector, len(gramian))
        # Of the Gramian, not of the cosines: the lengths of the rows are part of what is aligned.
        components = spectrum(gramian, source.proximal_level)
        values, vectors = components.values, components.vectors
        # All rows are zero.
        if not len(values):
            return np.zeros_like(preferences)
        common = self._common_eigenvalue(values)
        weights: NDArray[np.float64] = vectors @ (
            np.sqrt(common / values) * (preferences @ vectors)
        )
        return weights

    def _common_eigenvalue(self, ascending: NDArray[np.float64]) -> float:
        if self.scale_mode == "min":
            return float(ascending[0])
        if self.scale_mode == "median":
            return float(ascending[(len(ascending) - 1) // 2])
        return float(ascending.mean())
