from __future__ import annotations

from math import inf

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.linalg import eigh
from jdcore.validators import integer
from jdplugins.robust._rows import require_majority


@define(eq=False)
class CAFWeighting(GramianWeighting):
    """
    Covariance-bound agnostic filter: rows that stand out where variance is largest lose weight.

    Starting from equal weights c, the direction v in which the weighted covariance is largest is
    found, and ``c_i`` multiplied by ``1 - τ_i / max τ``, where ``τ_i`` is the squared distance of
    row i from the weighted mean along v, and the maximum is over the rows that still have weight.
    This goes on while the sum of c is above ``m - 2 n_byzantine``; the weighted mean with the
    smallest largest variance on the way is the update. From `Towards Trustworthy Federated Learning
    with Untrusted Participants <https://arxiv.org/pdf/2505.01874>`_.

    Choose it for a guarantee near that of :class:`SMEA <jdcore.aggregation.SMEA>` with any number
    of rows: it needs m eigenvalue problems at most.

    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import CAF
    >>> CAF(n_byzantine=2)(torch.tensor([[0.0], [0.0], [0.0], [0.0], [1000.0]]))
    tensor([0.])
    """

    n_byzantine: int = field(validator=integer(0))

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        require_majority(m, self.n_byzantine)
        # Deviations are squared once more, which must not leave the range of float64.
        gramian = gramian / (np.diagonal(gramian).max() or 1.0)
        masses = np.ones(m)
        least, best = inf, masses / m
        # Each round takes the whole weight of one row at least, so that there are at most m of
        # them.
        while masses.sum() > m - 2 * self.n_byzantine:
            weights = masses / masses.sum()
            variance, deviations = _widest(gramian, weights)
            if variance < least:
                least, best = variance, weights
            largest = deviations[masses > 0.0].max()
            if not largest:
                break  # the rows with weight are equal
            masses = masses * np.maximum(1.0 - deviations / largest, 0.0)
        return best


def _widest(
    gramian: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """The largest weighted variance, and multiples of the squared deviations in its direction."""
    products = gramian @ weights
    # Inner products of the rows as seen from their weighted mean.
    centred = gramian - products[:, None] - products + weights @ products
    # The m x m matrix has the same eigenvalues as the covariance of as many columns as J has.
    roots = np.sqrt(weights)
    variances, directions = eigh(centred * roots[:, None] * roots)
    along = centred @ (roots * directions[:, -1])
    # Rounding may leave a variance of zero slightly negative.
    return max(float(variances[-1]), 0.0), along**2
