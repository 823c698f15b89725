from __future__ import annotations

import math
from typing import Any, ClassVar
from weakref import ref

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore._by_class import ByClass
from jdcore.aggregation._answers import array_for
from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, gramian_error
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._row_vectors import check_row_vectors, row_vector_fields
from jdcore.aggregation._source import GramianSource, numbers_of
from jdcore.aggregation._weigh import weigh
from jdcore.errors import left_out
from jdcore.linalg import add_proximal
from jdcore.validators import boolean, check_gramian

# Entries whose squares are summed in less time than an array of truth values is made of them.
_SMALL = 4096
_DTYPE = np.dtype(np.float64)
_THERE = 128  # rows from which on it may pay to work where the Gramian is


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

    proximal: ClassVar[bool] = False
    """
    Whether :meth:`compute` gets the Gramian with :func:`jdcore.linalg.add_proximal`.

    True for methods whose weights solve an optimisation problem: their problem is then well-posed
    however the rows depend on each other, to the precision at which they are known.
    """

    looks_across: ClassVar[bool] = False
    """Whether :meth:`compute` gets the cross-Gramian in place of the Gramian."""

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        """
        :param gramian: Finite float64 Gramian [m, m] with m >= 1. Must not be modified.
        :returns: float64 weights [m].
        """
        raise left_out(self, "compute")

    def compute_there(self, gramian: Tensor) -> Tensor | None:
        """
        :meth:`compute` on the accelerator that holds the Gramian, for methods that gain by it.

        It is asked from 128 rows on, where the arithmetic takes longer than the calls.

        :param gramian: Finite float64 Gramian, Tensor [m, m]. Must not be modified.
        :returns: float64 weights [m] on the same device. None, as here: :meth:`compute` is asked,
            and the Gramian is copied to the CPU.
        """
        return None

    @on_numbers
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
        :param losses: Values of the objectives, Tensor [m], for methods that look at them.
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the Gramian is not a real floating square matrix, an argument of
            this weighting does not fit its size or device, or the losses are missing.
        :raises NonFiniteError: See ``check_finite``.
        :raises NonDifferentiableError: When differentiating through the weights.
        """
        check_gramian(gramian)
        weights = weigh(self, self.source_of(gramian, losses)).to(gramian)
        return forbid_differentiation(self, gramian, weights)

    def source_of(self, matrix: Tensor, losses: Tensor | None) -> GramianSource:
        """What the matrix that a call is given stands for: the Gramian, here."""
        return GramianSource.of(matrix, losses)

    def matrix_of(self, source: GramianSource) -> Tensor:
        """What :meth:`compute_there` looks at, float64 Tensor [m, m]: the Gramian, here."""
        return source.gramian()

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        """
        :meth:`compute`, for methods that look at more than the Gramian.

        :param gramian: As for :meth:`compute`.
        :param source: What it is the Gramian of: its precision, scale, losses, a second batch.
        :returns: float64 weights [m].
        """
        if self.proximal:
            gramian = add_proximal(gramian, source.proximal_level)
        return self.compute(gramian)

    def weigh(self, source: GramianSource, /) -> Tensor:
        """
        A call for those who know more of the Jacobian than its Gramian tells.

        :param source: The Jacobian. Its Gramian may be empty or non-finite, on any device.
        :returns: The m weights, a float64 Tensor on any device.
        """
        m = source.rows
        if row_vector_fields[ref(type(self))]:  # asked here, which is a call less
            check_row_vectors(self, m, source)
        if m == 0:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        if m >= _THERE:
            there = self._weigh_there(source)
            if there is not None:
                return there
        # No copy where the Gramian is on the CPU: `compute` must not modify it.
        across = self.looks_across
        array = numbers_of(self.matrix_of(source)) if across else source.array()
        known = source.finite and not across
        # A finite sum of squares has finite terms only, and costs less than looking at a few.
        small = known or (array.size <= _SMALL and math.isfinite(np.vdot(array, array)))
        if small or np.isfinite(array).all():
            weights = self.compute_from(array, source)
            # As nearly always; not reversed, which torch does not look at.
            if type(weights) is np.ndarray and weights.dtype is _DTYPE and weights.strides == (8,):
                return torch.from_numpy(weights)
            return torch.from_numpy(array_for("compute", f"[{m}]", weights))
        if finite_required(self.check_finite):
            raise gramian_error(array)
        return torch.full((m,), math.nan, dtype=torch.float64, device="cpu")

    def _weigh_there(self, source: GramianSource) -> Tensor | None:
        if not _computes_there[ref(type(self))]:
            return None
        gramian = self.matrix_of(source)
        if gramian.is_cpu or not bool(gramian.isfinite().all()):
            return None
        # A copy, since the Gramian belongs to the source, which others may ask for it later.
        if self.proximal:
            gramian = gramian.clone()
            gramian.diagonal().mul_(1.0 + source.proximal_level)
        return self.compute_there(gramian)


@ByClass
def _computes_there(cls: Any) -> bool:
    # A subclass that overrides `compute` alone means that, not what it inherits for accelerators.
    for base in cls.__mro__:
        if "compute_there" in vars(base):
            return base is not GramianWeighting
        if not vars(base).keys().isdisjoint(("compute", "compute_from")):
            return False
    return False


def row_weights(vector: Tensor | None, m: int) -> NDArray[np.float64]:
    """
    The entries of a preference vector as a new float64 array, or 1/m each where there is none.

    :param vector: Vector [m] of any real floating dtype, on any device.
    """
    if vector is None:
        return np.array([1.0 / m] * m)  # np.full takes longer for the usual m
    return np.array(vector.tolist(), dtype=np.float64)
