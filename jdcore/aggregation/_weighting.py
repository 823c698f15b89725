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

    uses_gramian: ClassVar[bool] = True
    """False if the weights depend on m alone: no Gramian is then computed, and the aggregation is
    differentiable."""

    scale_degree: ClassVar[int] = 0
    """d such that the weights of ``s * J`` are ``s**d`` times those of J."""

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        """
        :param gramian: Finite float64 Gramian [m, m] with m >= 1 (undefined entries if
            :attr:`uses_gramian` is False). Must not be modified.
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
        check_row_vectors(self, gramian.shape[0], gramian.device)
        weights = self._weights(gramian.detach() if gramian.requires_grad else gramian)
        return forbid_differentiation(self, gramian, weights) if self.uses_gramian else weights

    def _weights(self, gramian: Tensor) -> Tensor:
        m = gramian.shape[0]
        if m == 0:
            return gramian.new_zeros(0)
        as_it_is = gramian.is_cpu and gramian.dtype == torch.float64
        array = (gramian if as_it_is else gramian.to("cpu", torch.float64)).numpy()
        # A finite sum of squares has finite terms only, and costs less than looking at each.
        if self.uses_gramian and not (
            math.isfinite(np.vdot(array, array)) or np.isfinite(array).all()
        ):
            if finite_required(self.check_finite):
                raise refuse_gramian(array)
            return gramian.new_full((m,), float("nan"))
        weights = torch.from_numpy(self.compute(array))
        return weights if as_it_is else weights.to(gramian.device, gramian.dtype)


def row_weights(vector: Tensor | None, m: int) -> NDArray[np.float64]:
    """The entries of a preference vector as float64, or 1/m each where there is none."""
    if vector is None:
        return np.full(m, 1.0 / m)
    return vector.detach().to(device="cpu", dtype=torch.float64).numpy()
