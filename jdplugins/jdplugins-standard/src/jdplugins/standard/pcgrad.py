from __future__ import annotations

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.linalg import equilibrate
from jdcore.validators import generator
from jdplugins.standard._surgery import permutations, summed_rows


@define(eq=False)
class PCGradWeighting(GramianWeighting):
    """
    Projecting conflicting gradients: each row loses its components against the others.

    Each row visits the others in a random order of its own. Where its present version has a
    negative inner product with the row visited, it is projected onto the orthogonal complement of
    that row. The update is the sum of the modified rows. From `Gradient Surgery for Multi-Task
    Learning <https://arxiv.org/pdf/2001.06782>`_.

    With two objectives the update conflicts with neither; with more it may, since a later
    projection can undo an earlier one.

    All rows take their k-th visit at once: m - 1 vectorised steps instead of m (m - 1).

    :param generator: Source of the random orders, on any device; the default generator of torch if
        None.

    >>> import torch
    >>> from jdcore.aggregation import PCGrad
    >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.5000])
    """

    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        # What a projection removes does not depend on the length of the row visited: rows of length
        # 1 do, whose squares cannot leave the range.
        cosines, norms, inverses = equilibrate(gramian)
        coefficients = _project(cosines, _orders_of_others(len(gramian), self.generator))
        return summed_rows(coefficients, norms, inverses)


def _orders_of_others(m: int, generator: torch.Generator | None) -> NDArray[np.int64]:
    """For each row i an order of all rows but i, array [m, m - 1]."""
    orders = permutations(m, m, generator)
    others: NDArray[np.int64] = orders[orders != np.arange(m)[:, None]].reshape(m, m - 1)
    return others


def _project(cosines: NDArray[np.float64], orders: NDArray[np.int64]) -> NDArray[np.float64]:
    """The modified rows in terms of the rows of length 1, see :func:`summed_rows`."""
    m = len(cosines)
    rows = np.arange(m)
    coefficients = np.eye(m)
    visited = np.empty_like(cosines)
    for others in np.ascontiguousarray(orders.T):
        np.take(cosines, others, axis=0, out=visited)
        products = np.einsum("ij,ij->i", coefficients, visited)
        # Each row is visited once, so its coefficient was zero before.
        coefficients[rows, others] = np.maximum(-products, 0.0)
    return coefficients
