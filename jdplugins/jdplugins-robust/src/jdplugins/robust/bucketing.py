from __future__ import annotations

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, RowMixing
from jdcore.validators import generator, integer


@define(eq=False)
class Bucketing(RowMixing):
    """
    Means of random buckets of rows, handed to another aggregator.

    The rows are shuffled and averaged by ``bucket_size``; the last bucket may be smaller. From
    `Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing
    <https://arxiv.org/pdf/2006.09365>`_.

    Choose it around a robust aggregator when honest rows differ among themselves, and bad rows are
    few: in the worst case each spoils a bucket of its own, so the wrapped method has to withstand
    as many bad rows among ``m / bucket_size``.

    :param aggregator: What aggregates the means.
    :param bucket_size: Number of rows in a bucket. 1 leaves the rows as they are, shuffled.
    :param generator: Source of the random order, on any device; the default generator of torch if
        None.

    >>> import torch
    >>> from jdcore.aggregation import Bucketing, CoordinateWiseMedian
    >>> bucketing = Bucketing(CoordinateWiseMedian(), bucket_size=3)
    >>> bucketing(torch.tensor([[0.0, 3.0], [1.0, 3.0], [5.0, 0.0]]))  # one bucket
    tensor([2., 2.])
    """

    bucket_size: int = field(default=2, validator=integer(1), kw_only=True)
    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        m = source.rows
        # torch draws on the device of the generator only.
        device = "cpu" if self.generator is None else self.generator.device
        order = torch.randperm(m, generator=self.generator, device=device).tolist()
        mixing = np.zeros((-(-m // self.bucket_size), m))
        mixing[np.arange(m) // self.bucket_size, order] = 1.0
        means: NDArray[np.float64] = mixing / mixing.sum(axis=1, keepdims=True)
        return means
