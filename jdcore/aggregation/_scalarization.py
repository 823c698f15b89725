from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore._by_class import ByClass
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._row_vectors import Placed, check_row_vectors
from jdcore.aggregation._source import GramianSource
from jdcore.aggregation._weigh import weigh
from jdcore.errors import left_out
from jdcore.linalg._combine import sent
from jdcore.validators import boolean, check_gramian

_ARRAYS = {torch.float32: np.float32, torch.float64: np.float64}


def equal_weights(weight: float, m: int, dtype: torch.dtype) -> Tensor:
    """
    A vector of m equal weights on the CPU, which must not be modified.

    It is made in a fraction of the time that ``torch.full`` takes.

    :param dtype: float32 or float64.
    """
    # The numbers are kept, but no Tensor: one made in inference mode is refused elsewhere.
    return torch.from_numpy(_equal(weight, m, dtype))


@lru_cache(maxsize=16)
def _equal(weight: float, m: int, dtype: torch.dtype) -> NDArray[np.floating[Any]]:
    return np.full(m, weight, _ARRAYS[dtype])


@define(eq=False)
class ScalarizationWeighting:
    """
    Base class of weightings that do not look at the Gramian, but at the number of rows alone.

    Their update is the gradient of one scalar, a weighted sum of the losses. No Gramian is computed
    for them, and their aggregators are differentiable. A subclass is an attrs class
    (``@define(eq=False)``) that implements :meth:`compute`; a field whose validator is
    :func:`jdcore.validators.row_vector` is checked against the number of rows and the device at
    each call.

    :param check_finite: Whether a Jacobian with NaN or infinite entries raises
        :class:`~jdcore.errors.NonFiniteError` in the aggregator, instead of giving NaN. None means:
        as the environment variable ``JDCORE_CHECK_FINITE`` says (``1`` raises), else no.
    """

    check_finite: bool | None = field(default=None, kw_only=True, validator=boolean, repr=False)

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        """
        :param m: Number of rows, at least 1.
        :param dtype: float64, or float32 for Jacobians of narrower dtypes.
        :returns: Weights [m] of this dtype, on any device. They will not be modified.
        """
        raise left_out(self, "compute")

    @on_numbers
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: Real floating Tensor [m, m], whose entries are not read.
        :param losses: Values of the objectives, Tensor [m], which are not read either.
        :returns: Weights [m], same dtype and device.
        :raises ParameterError: If the Gramian is not a real floating square matrix, or an argument
            of this weighting does not fit its size or device.
        """
        check_gramian(gramian)
        weights = weigh(self, GramianSource.of(gramian, losses))
        return sent(weights, gramian.device, gramian.dtype, copy=True)

    def weigh(self, source: GramianSource, /) -> Tensor:
        """
        A call for those who have no Gramian; it is not asked for.

        :param source: The Jacobian.
        :returns: What :meth:`compute` returns, or no weights for no rows.
        """
        return self.weigh_rows(source.rows, source.precision, source)

    def weigh_rows(self, m: int, precision: torch.dtype, given: Placed) -> Tensor:
        """
        A call for those who have nothing but rows, which saves them to make a source of these.

        :param m: Their number.
        :param precision: The narrowest dtype of their entries.
        :param given: What lies on their device, such as the rows.
        :returns: As :meth:`weigh`.
        """
        check_row_vectors(self, m, given)
        # Float32 factors hold what rows of half precision need; they are never rounded to that.
        wide = torch.float64 if precision is torch.float64 else torch.float32
        return self.compute(m, wide) if m else torch.empty(0, dtype=wide, device="cpu")


@ByClass
def looks_at_no_row(cls: Any) -> bool:
    """Whether a class of weightings inherits :meth:`ScalarizationWeighting.weigh_rows` as it is."""
    base = ScalarizationWeighting
    inherited = ("__call__", "weigh", "weigh_rows")
    return all(getattr(cls, name, None) is getattr(base, name) for name in inherited)
