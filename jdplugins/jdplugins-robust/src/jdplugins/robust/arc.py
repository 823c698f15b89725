from __future__ import annotations

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, RowMixing, row_lengths
from jdcore.validators import integer
from jdplugins.robust._rows import clipping_factors, require_majority


@define(eq=False)
class ARC(RowMixing):
    """
    Adaptive robust clipping: the longest rows clipped to the norm of the next one.

    With f = ``n_byzantine``, the ``⌊2 (f / m) (m - f)⌋`` longest rows are clipped to the norm of
    the longest of the others, and another aggregator has the last word. From `Adaptive Gradient
    Clipping for Robust Federated Learning <https://arxiv.org/pdf/2405.14432>`_.

    Choose it around any robust aggregator: in contrast to :class:`Clipping
    <jdcore.aggregation.Clipping>` it keeps the guarantee of the wrapped method, and there is no
    norm to choose.

    :param aggregator: What aggregates the clipped rows.
    :param n_byzantine: Number of rows that may be adversarial; at least ``2 n_byzantine + 1`` rows
        are needed.

    >>> import torch
    >>> from jdcore.aggregation import ARC, CoordinateWiseMedian
    >>> arc = ARC(CoordinateWiseMedian(), n_byzantine=1)
    >>> arc(torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, 3.0]]))  # the first is clipped to (3, 0)
    tensor([0., 1.])
    """

    n_byzantine: int = field(validator=integer(0), kw_only=True)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        m, f = source.rows, self.n_byzantine
        require_majority(m, f)
        lengths = row_lengths(source)
        # In integers, since the rounding of floats would decide how many rows are clipped.
        limit = np.sort(lengths)[m - 1 - 2 * f * (m - f) // m]
        return np.diag(clipping_factors(lengths, float(limit)))
