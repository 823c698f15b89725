from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation._finite import finite_required
from jdcore.aggregation._source import GramianSource
from jdcore.aggregation._weighting import GramianWeighting
from jdcore.errors import NonFiniteError, left_out
from jdcore.spec import AggregatorSpec


def example_inputs(spec: AggregatorSpec, matrix: Tensor) -> dict[str, Any]:
    """
    Keyword arguments that a call of a method's aggregator needs beside a Jacobian, made up of it.

    :param spec: Describes the method.
    :param matrix: Jacobian [m, n].
    """
    inputs: dict[str, Any] = {}
    if spec.losses:
        # Between 1/2 and 3/2; of each row by itself and independent of its scale.
        positive = (matrix > 0).double().sum(dim=1)
        inputs["losses"] = 0.5 + positive / max(1, matrix.shape[1])
    if spec.cross_gramian:
        # Another batch of similar rows, which keeps zero rows, order and scale.
        inputs["second"] = 0.75 * matrix + 0.25 * matrix.roll(1, dims=1)
    return inputs


@define(eq=False)
class LossWeighting(GramianWeighting):
    """
    Base class of weightings that look at the Gramian and at the values of the losses.

    A subclass implements :meth:`compute_with`, and its spec says ``losses=True``. A call without
    losses raises a ParameterError that says how to give them. Losses that are NaN or infinite count
    as non-finite input, see ``check_finite`` of :class:`GramianWeighting`.
    """

    def compute_with(
        self, gramian: NDArray[np.float64], losses: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite float64 Gramian [m, m] with m >= 1. Must not be modified.
        :param losses: Finite float64 values [m] of the objectives. Must not be modified.
        :returns: float64 weights [m].
        """
        raise left_out(self, "compute_with")

    def weigh(self, source: GramianSource, /) -> Tensor:
        """
        See :meth:`GramianWeighting.weigh`.

        :raises ParameterError: If the source does not know the losses.
        """
        # Before the Gramian is asked for: a loss that diverged is told by its own name.
        broken = (~torch.isfinite(source.known_losses())).nonzero().flatten().tolist()
        if not broken:
            return super().weigh(source)
        if finite_required(self.check_finite):
            raise NonFiniteError(broken, "values")
        return torch.full((source.rows,), math.nan, dtype=torch.float64, device="cpu")

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        return self.compute_with(gramian, source.known_losses().double().cpu().numpy())


@define(eq=False)
class CrossGramianWeighting(GramianWeighting):
    """
    Base class of weightings that look at the cross-Gramian of two independent batches.

    ``J₁ J₂ᵀ`` is an unbiased estimate of the Gramian of the expected losses, where ``J Jᵀ`` of one
    batch is biased by the noise of its rows. It is neither symmetric nor positive semi-definite. A
    subclass implements :meth:`compute`, which is given the cross-Gramian in place of the Gramian,
    and its spec says ``cross_gramian=True``. Where there is one batch only, a ParameterError says
    how to give two.
    """

    looks_across: ClassVar[bool] = True

    def source_of(self, matrix: Tensor, losses: Tensor | None) -> GramianSource:
        """What the matrix that a call is given stands for: the cross-Gramian."""
        return GramianSource.of_cross(matrix, losses)

    def matrix_of(self, source: GramianSource) -> Tensor:
        """
        The cross-Gramian, float64 Tensor [m, m].

        :raises ParameterError: If there is one batch only.
        """
        return source.cross_gramian()
