"""Methods that several test modules use: the core has none."""

from __future__ import annotations

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator, GramianWeighting, ScalarizationWeighting


@define(eq=False)
class HalvesWeighting(GramianWeighting):
    """Asks for the Gramian, and gives each row one half."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(gramian), 0.5)


@define(eq=False)
class EqualWeighting(ScalarizationWeighting):
    """The mean, which asks for no Gramian."""

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return torch.full((m,), 1 / m, dtype=dtype)


@define(eq=False)
class Largest(CoordinatewiseAggregator):
    """The largest entry of each column: no weighted sum of the rows."""

    def compute(self, columns: Tensor) -> Tensor:
        return columns.amax(0)
