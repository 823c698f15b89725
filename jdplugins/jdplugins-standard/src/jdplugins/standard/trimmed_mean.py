from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.errors import ParameterError
from jdcore.validators import integer

# Up to here, tournaments beat sorting.
_MAX_PASSES = 3
_MAX_ENTRIES = 256


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
        m, t = columns.shape[0], self.trim_number
        if t > _MAX_PASSES or t * m > _MAX_ENTRIES:
            # What is sorted lies side by side in memory then.
            kept = columns.T.contiguous().sort(dim=1).values[:, t : m - t].T
        else:
            kept = columns
            for _ in range(t):
                kept = _trim(kept)
        return kept.mean(dim=0, dtype=torch.float64)


def _trim(rows: Tensor) -> Tensor:
    """Drop the smallest and the largest entry of each column; the order within columns is lost."""
    lows, highs, left_over = _exchange(rows)
    if left_over is not None:  # it can still be the smallest or the largest
        lowest, highest, _ = _exchange(torch.cat([lows[-1:], left_over]))
        lows, highs = torch.cat([lows[:-1], lowest]), torch.cat([highs, highest])
    return torch.cat([*_losers(lows, smallest=True), *_losers(highs, smallest=False)])


def _exchange(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The smaller and the larger ones of pairs of rows, and the row that is left over."""
    m = rows.shape[0]  # `len` of a Tensor is a function of Python, which takes longer
    half = m // 2
    one, two = rows[:half], rows[half : 2 * half]
    left_over = rows[2 * half :] if m > 2 * half else None
    return torch.minimum(one, two), torch.maximum(one, two), left_over


def _losers(rows: Tensor, *, smallest: bool) -> list[Tensor]:
    """All entries but the extreme one of each column, by a tournament."""
    losers = []
    while rows.shape[0] > 2:
        lows, highs, left_over = _exchange(rows)
        winners, beaten = (lows, highs) if smallest else (highs, lows)
        losers.append(beaten)
        rows = winners if left_over is None else torch.cat([winners, left_over])
    if rows.shape[0] == 2:
        losers.append((torch.maximum if smallest else torch.minimum)(rows[:1], rows[1:]))
    return losers
