from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, refuse_gramian
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.validators import boolean, check_gramian

_FEW = 4096


@define(eq=False)
class GramianWeighting:
    """
    Base class that gives a weighting the laws of :class:`~jdcore.Weighting`.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`compute` on a
    float64 array and need not think of dtypes, devices, empty or non-finite input, nor of
    differentiation. A field whose validator is :func:`jdcore.validators.row_vector` is checked
    against the number of rows and the device at each call.

    :param check_finite: Whether NaN or infinite input raises
        :class:`~jdcore.errors.NonFiniteError` instead of giving NaN weights. None means: as the
        environment variable ``JDCORE_CHECK_FINITE`` says (``1`` raises), else no.
    """

    scale_degree: ClassVar[int] = 0
    """d such that the weights of ``s * J`` are ``s**d`` times those of J."""

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        """
        :param gramian: Finite float64 Gramian [m, m] with m >= 1. Must not be modified.
        :returns: float64 weights [m].
        """
        raise NotImplementedError

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """
        :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the Gramian is not a real floating square matrix, or an argument
            of this weighting does not fit its size or device.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the weights.
        """
        check_gramian(gramian)
        array = gramian.detach().to("cpu", torch.float64).numpy()
        weights = torch.from_numpy(self.weigh(array, gramian.device)).to(gramian)
        return forbid_differentiation(self, gramian, weights)

    def weigh(self, gramian: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
        """
        A call without its conversions, for those who have a float64 Gramian already.

        :param gramian: Gramian [m, m], which may be empty or non-finite.
        :param device: Device of the Jacobian, for arguments of this weighting to be checked.
        :returns: float64 weights [m].
        """
        m = len(gramian)
        check_row_vectors(self, m, device)
        if m == 0:
            return np.zeros(0)
        if _all_finite(gramian):
            return self.compute(gramian)
        if finite_required(self.check_finite):
            raise refuse_gramian(gramian)
        return np.full(m, math.nan)


def _all_finite(gramian: NDArray[np.float64]) -> bool:
    # A finite sum of squares has finite terms only, and costs less than looking at each of a few.
    few = gramian.size <= _FEW
    return (few and math.isfinite(np.vdot(gramian, gramian))) or bool(np.isfinite(gramian).all())


def row_weights(vector: Tensor | None, m: int) -> NDArray[np.float64]:
    """
    The entries of a preference vector as a new float64 array, or 1/m each where there is none.

    :param vector: Vector [m] of any real floating dtype, on any device.
    """
    if vector is None:
        return np.array([1.0 / m] * m)  # np.full takes longer for the usual m
    return np.array(vector.tolist(), dtype=np.float64)
