from __future__ import annotations

from attrs import define
from torch import Tensor

from jdcore.linalg import flatten_gramian, objectives_shape
from jdcore.protocols import Weighting


@define(eq=False)
class Flattening:
    """
    A :class:`~jdcore.GeneralizedWeighting` that makes every element of the losses one objective.

    :param weighting: Weighting of the m1 * ... * mk objectives.

    >>> import torch
    >>> from jdcore.aggregation import Flattening, SumWeighting
    >>> Flattening(SumWeighting())(torch.ones(2, 3, 3, 2)).shape
    torch.Size([2, 3])
    """

    weighting: Weighting

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """
        :param gramian: Generalized Gramian [m1, ..., mk, mk, ..., m1].
        :returns: Weights [m1, ..., mk].
        :raises ParameterError: If the shape does not read the same in both directions.
        """
        shape = objectives_shape(gramian)
        return self.weighting(flatten_gramian(gramian)).reshape(shape)
