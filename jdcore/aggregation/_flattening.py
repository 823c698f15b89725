from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field
from torch import Tensor

from jdcore.aggregation._source import GramianSource
from jdcore.aggregation._weigh import as_weighting, weigh
from jdcore.linalg import flatten_gramian, objectives_shape
from jdcore.protocols import Weighting


@define(eq=False)
class Flattening:
    """
    A :class:`~jdcore.GeneralizedWeighting` that makes every element of the losses one objective.

    :param weighting: Weighting of the m1 * ... * mk objectives, or the aggregator of one.
    :raises ParameterTypeError: If it is an aggregator that needs the Jacobian itself.

    >>> import torch
    >>> from jdcore.aggregation import Flattening, SumWeighting
    >>> Flattening(SumWeighting())(torch.ones(2, 3, 3, 2)).shape
    torch.Size([2, 3])
    """

    weighting: Weighting = field(converter=as_weighting)

    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: Generalized Gramian [m1, ..., mk, mk, ..., m1].
        :param losses: Values of the objectives, Tensor [m1, ..., mk], for methods that look at
            them.
        :returns: Weights [m1, ..., mk].
        :raises ParameterError: If the shape does not read the same in both directions.
        """
        source = GramianSource.of(flatten_gramian(gramian), losses)
        return weigh(self, source, objectives_shape(gramian)).to(gramian)

    def weigh(self, source: GramianSource, shape: Sequence[int] | None = None, /) -> Tensor:
        """
        A call for those who know more of the Jacobian than its Gramian tells.

        :param source: The Jacobian of the flattened objectives.
        :param shape: Shape [m1, ..., mk] of the objectives; None for a vector of them.
        :returns: Weights of that shape.
        """
        # The order of the flattened objectives is that in which `flatten_gramian` reads them.
        weights = weigh(self.weighting, source)
        return weights if shape is None else weights.reshape(tuple(shape))
