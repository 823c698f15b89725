from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, RowMixing, row_lengths
from jdcore.validators import real
from jdplugins.robust._rows import clipping_factors


@define(eq=False)
class Clipping(RowMixing):
    """
    Rows clipped to a given norm, handed to another aggregator.

    Row i is multiplied by ``min(1, max_norm / ‖g_i‖)``: the gradient clipping of `On the Difficulty
    of Training Recurrent Neural Networks <https://arxiv.org/pdf/1211.5063>`_, row by row.

    Choose it to bound what a single row can do, if the scale of honest rows is known;
    :class:`ARC <jdcore.aggregation.ARC>` finds the norm by itself. The update does not scale with
    the matrix.

    :param aggregator: What aggregates the clipped rows.
    :param max_norm: Norm that no row exceeds afterwards.

    >>> import torch
    >>> from jdcore.aggregation import Clipping, CoordinateWiseMedian
    >>> clipping = Clipping(CoordinateWiseMedian(), max_norm=5.0)
    >>> clipping(torch.tensor([[30.0, 40.0], [3.0, 4.0], [3.0, 4.0]]))
    tensor([3., 4.])
    """

    max_norm: float = field(default=2.0, validator=real(0.0), kw_only=True)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        # Methods of the Gramian multiply that and the weights by this matrix, never the rows.
        return np.diag(clipping_factors(row_lengths(source), self.max_norm))
