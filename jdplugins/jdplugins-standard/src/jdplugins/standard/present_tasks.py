from __future__ import annotations

from typing import Any

import numpy as np
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianSource, RowMixing, row_lengths
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import describe_tensor, holds_real_numbers


def _mask(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is None:
        return
    expected = "a vector with one entry per objective, True where it is present"
    if not isinstance(value, Tensor):
        raise ParameterTypeError(attribute.name, expected, describe_tensor(value))
    if not holds_real_numbers(value) or value.ndim != 1:
        raise ParameterError(attribute.name, expected, describe_tensor(value))


@define(eq=False)
class PresentTasks(RowMixing):
    """
    Another method on those objectives only that are present in the batch.

    Where a batch has no sample of some task, the row of that task is zero, and many a method takes
    a zero row for an objective that cannot be improved: :class:`MGDA <jdcore.aggregation.MGDA>`
    stops altogether, the mean is shortened. Here, absent objectives take no part and get weight
    zero, and the method sees as many rows as are left. Where none is left, the update is zero, and
    the method is not asked.

    Arguments of the wrapped method with one entry per objective have to fit the number of those
    present, and so has its state, if it has one entry per objective.

    :param aggregator: The wrapped :class:`~jdcore.Aggregator`.
    :param present: Tensor [m], true (or not zero) where an objective is present; set it before each
        step: ``aggregator.present = mask``. None takes the objectives whose row is not zero.
    :raises ParameterError: At a call, if ``present`` does not have one entry per objective.

    >>> import torch
    >>> from jdcore.aggregation import MGDA, PresentTasks
    >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    >>> MGDA()(matrix)
    tensor([0., 0.])
    >>> PresentTasks(MGDA())(matrix)
    tensor([1., 1.])
    """

    present: Tensor | None = field(default=None, validator=_mask)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        # Rows are left out, not made zero: methods count them, as the mean does.
        return np.eye(source.rows)[self._kept(source)]

    def _kept(self, source: GramianSource) -> NDArray[np.bool_]:
        if self.present is None:
            kept: NDArray[np.bool_] = row_lengths(source) > 0.0
            return kept
        if len(self.present) != source.rows:
            expected = f"of length {source.rows}, the number of objectives"
            raise ParameterError("present", expected, f"length {len(self.present)}")
        mask: NDArray[np.bool_] = (self.present != 0).cpu().numpy()
        return mask
