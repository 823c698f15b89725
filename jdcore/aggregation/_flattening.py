from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._on_numbers import on_numbers
from jdcore.aggregation._source import GramianSource
from jdcore.aggregation._weigh import as_weighting, weigh
from jdcore.errors import ParameterError
from jdcore.linalg import flatten_gramian, objectives_shape
from jdcore.linalg._combine import sent
from jdcore.protocols import Weighting
from jdcore.validators import check_floating, describe_tensor


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

    @on_numbers
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        """
        :param gramian: Generalized Gramian [m1, ..., mk, mk, ..., m1].
        :param losses: Values of the objectives, Tensor [m1, ..., mk], for methods that look at
            them.
        :returns: Weights [m1, ..., mk], same dtype and device.
        :raises ParameterError: If the Gramian is no real floating Tensor, its shape does not read
            the same in both directions, or an argument of the weighting does not fit it.
        :raises NonDifferentiableError: When differentiating through a non-differentiable method.
        """
        check_floating(gramian, "gramian")
        shape = objectives_shape(gramian)
        if isinstance(losses, Tensor) and losses.ndim > 1 and losses.shape != shape:
            expected = f"of shape {list(shape)}, that of the objectives"
            raise ParameterError("losses", expected, describe_tensor(losses))
        source = GramianSource.of(flatten_gramian(gramian), losses)
        # A copy: the caller may write into it, and what a weighting returns may be its own.
        weights = sent(weigh(self, source, shape), gramian.device, gramian.dtype, copy=True)
        return forbid_differentiation(self, gramian, weights) if source.asked else weights

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
