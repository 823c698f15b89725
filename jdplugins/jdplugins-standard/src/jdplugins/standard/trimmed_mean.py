from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.errors import ParameterError
from jdcore.validators import integer

# Up to here, passes of pairwise exchanges beat sorting.
_MAX_PASSES = 3
_MAX_EXCHANGES = 256


@define(eq=False)
class TrimmedMean(CoordinatewiseAggregator):
    """
    Mean of each coordinate without its ``trim_number`` largest and smallest entries.

    From `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    <https://proceedings.mlr.press/v80/yin18a/yin18a.pdf>`_.

    Choose it in distributed training when up to ``trim_number`` workers may send anything. In
    contrast to :class:`Krum <jdcore.aggregation.Krum>` it uses all other rows, and sees single
    coordinates: it is an aggregator only, not a weighting of the Gramian.

    NaN is not an extreme value that could be trimmed away: it gives a vector of NaN.

    :param trim_number: Number of entries to leave out at either end; at least
        ``2 trim_number + 1`` rows are needed.

    >>> import torch
    >>> from jdcore.aggregation import TrimmedMean
    >>> TrimmedMean(trim_number=1)(torch.tensor([[1.0, 9.0], [2.0, 5.0], [60.0, 4.0], [4.0, 1.0]]))
    tensor([3.0000, 4.5000])
    """

    trim_number: int = field(validator=integer(0))

    def check_rows(self, m: int) -> None:
        """
        Refuse fewer than ``2 trim_number + 1`` rows.

        :param m: Number of rows.
        :raises ParameterError: If there are too few.
        """
        least = 2 * self.trim_number + 1
        if m < least:
            raise ParameterError(
                "matrix", f"of at least {least} rows (2 trim_number + 1)", f"{m} rows"
            )

    def compute(self, columns: Tensor) -> Tensor:
        m, t = len(columns), self.trim_number
        if t == 0:
            kept = columns
        elif t <= _MAX_PASSES and t * m <= _MAX_EXCHANGES:
            kept = torch.stack(_trim(list(columns.unbind()), t))
        else:
            kept = columns.T.contiguous().sort(dim=1).values[:, t : m - t].T
        return kept.sum(dim=0, dtype=torch.float64) / (m - 2 * t)


def _trim(rows: list[Tensor], times: int) -> list[Tensor]:
    """Drop the smallest and the largest entry of each column, several times over."""
    for _ in range(times):
        largest, rows = rows[0], rows[1:]
        for i, row in enumerate(rows):
            largest, rows[i] = torch.maximum(largest, row), torch.minimum(largest, row)
        smallest, rows = rows[0], rows[1:]
        for i, row in enumerate(rows):
            smallest, rows[i] = torch.minimum(smallest, row), torch.maximum(smallest, row)
    return rows
