from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required, is_finite, nonfinite_rows
from jdcore.aggregation._scalarization import ScalarizationWeighting
from jdcore.aggregation._weighting import GramianWeighting, RowWeights
from jdcore.errors import NonFiniteError, ParameterTypeError
from jdcore.linalg import combine
from jdcore.linalg._gramian import sum_gramians
from jdcore.protocols import Weighting
from jdcore.validators import check_blocks, check_matrix

_STATEFUL_METHODS = ("reset", "state_dict", "load_state_dict")


def _callable(_: Any, attribute: Any, value: Any) -> None:
    if not callable(value):
        raise ParameterTypeError(attribute.name, "a Weighting", repr(value))


@define(eq=False)
class GramianAggregator:
    """
    The aggregator of a weighting: Gramian, weights, weighted sum of the rows.

    Every Gramian method uses this one implementation, so it works with autojac (block by block,
    without concatenating Jacobians) and with autogram alike.

    :param weighting: Any :class:`~jdcore.Weighting`, also a plain function.

    >>> import torch
    >>> from jdcore.aggregation import GramianAggregator, MeanWeighting
    >>> GramianAggregator(MeanWeighting())(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """

    weighting: Weighting = field(validator=_callable)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """
        :param matrix: Jacobian, real floating Tensor [m, n].
        :returns: Update [n], same dtype and device.
        :raises ParameterError: If the matrix is not a real floating matrix, or an argument of the
            weighting does not fit it.
        :raises NonFiniteError: If the weighting asks for finite input and the matrix is not.
        :raises NonDifferentiableError: When differentiating through a non-differentiable method.
        """
        check_matrix(matrix)
        if isinstance(self.weighting, ScalarizationWeighting):
            weights = self.weighting.weigh(matrix.shape[0], matrix.device, matrix.dtype)
            vector = combine(weights, matrix)
            if is_finite(vector):
                return vector
            return _examine(self.weighting, [matrix], [vector], weights)[0][0]
        source = matrix.detach() if matrix.requires_grad else matrix
        vector = combine(_weigh(self.weighting, [source]), source)
        return forbid_differentiation(self, matrix, vector) if matrix.requires_grad else vector

    def aggregate_blocks(self, blocks: Sequence[Tensor], /) -> tuple[list[Tensor], Tensor]:
        """
        Aggregate the Jacobian given as column blocks, without putting them together.

        :param blocks: At least one matrix [m, n1], [m, n2], ...; their dtypes may differ.
        :returns: Vectors [n1], [n2], ... in the dtypes of the blocks, and the weights [m] in the
            promoted dtype.
        :raises ParameterError: If a block is no real floating matrix or the numbers of rows differ.
        """
        check_blocks(blocks)
        sources = [block.detach() for block in blocks]
        dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
        weights: RowWeights | Tensor
        if isinstance(self.weighting, ScalarizationWeighting):
            weights = self.weighting.weigh(blocks[0].shape[0], blocks[0].device, dtype)
            vectors = [combine(weights, source) for source in sources]
            if not all(map(is_finite, vectors)):
                vectors, weights = _examine(self.weighting, sources, vectors, weights)
        else:
            weights = _weigh(self.weighting, sources)
            vectors = [combine(weights, source) for source in sources]
        returned = torch.as_tensor(weights, dtype=dtype).to(blocks[0].device, copy=True)
        return vectors, returned


def _weigh(weighting: Weighting, blocks: list[Tensor]) -> RowWeights | Tensor:
    product = sum_gramians(blocks)
    for block in blocks:
        if block.dtype == torch.float64:  # squares of narrower dtypes cannot leave the range
            largest = float(product.diagonal().max()) if len(product) else 1.0
            if not 1e-250 < largest < 1e250:
                return _weigh_rescaled(weighting, blocks, product)
            break
    return _ask(weighting, product)


def _weigh_rescaled(
    weighting: Weighting, blocks: list[Tensor], product: Tensor
) -> RowWeights | Tensor:
    largest = max(float(block.abs().max()) if block.numel() else 0.0 for block in blocks)
    if not 0.0 < largest < math.inf:
        return _ask(weighting, product)
    # A power of two, so that dividing by it is exact.
    scale = 2.0 ** math.frexp(largest)[1]
    weights = _ask(weighting, sum_gramians([block / scale for block in blocks]))
    weights = weights if isinstance(weights, Tensor) else np.asarray(weights, dtype=np.float64)
    return weights * scale ** getattr(weighting, "scale_degree", 0)


def _ask(weighting: Weighting, gramian: Tensor) -> RowWeights | Tensor:
    # For a handful of rows, going through Tensors would cost as much as the weights themselves.
    overridden = type(weighting).__call__ is not GramianWeighting.__call__
    if isinstance(weighting, GramianWeighting) and not overridden:
        return weighting.weigh(gramian, gramian.device)
    return weighting(gramian)


def _examine(
    weighting: ScalarizationWeighting, blocks: list[Tensor], vectors: list[Tensor], weights: Tensor
) -> tuple[list[Tensor], Tensor]:
    """What a scalarization answers where its vectors are not finite."""
    rows = nonfinite_rows(blocks)
    if not rows:
        return vectors, weights  # a finite sum that overflowed in its own dtype
    if finite_required(weighting.check_finite):
        raise NonFiniteError(rows)
    return [vector * math.nan for vector in vectors], weights * math.nan


class ComposedAggregator(GramianAggregator):
    """Base of the classes made by :func:`compose`; they take the arguments of their weighting."""

    weighting_class: ClassVar[type]
    qualified_name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.weighting_class(*args, **kwargs))

    def __repr__(self) -> str:
        arguments = repr(self.weighting).partition("(")[2]
        return f"{type(self).__name__}({arguments}"

    def __reduce__(self) -> tuple[Any, ...]:
        # By qualified name: the short name may belong to nobody where two distributions claim it.
        return _restore, (self.qualified_name, self.weighting)


class _StatefulComposedAggregator(ComposedAggregator):
    """Composed of a :class:`~jdcore.Stateful` weighting, which keeps the state."""

    weighting: Any

    def reset(self) -> None:
        """Return to the state of a new object."""
        self.weighting.reset()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state, which is that of ``.weighting``."""
        state: dict[str, Any] = self.weighting.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """
        Restore a state.

        :param state: What :meth:`state_dict` returned, here or of ``.weighting``.
        :raises ParameterError: If it does not fit; the state is then left as it was.
        """
        self.weighting.load_state_dict(state)


def compose(
    class_name: str, weighting_class: type, qualified_name: str
) -> type[ComposedAggregator]:
    """
    Make the aggregator class of a weighting class.

    :param class_name: Name of the new class, e.g. ``"UPGrad"``.
    :param weighting_class: Class of the weighting; its docstring and signature are taken over.
    :param qualified_name: ``"distribution:name"``, under which the registry finds the class again.
    """
    namespace = {
        "__doc__": weighting_class.__doc__,
        "__module__": "jdcore.aggregation",
        "__signature__": inspect.signature(weighting_class),
        "weighting_class": weighting_class,
        "qualified_name": qualified_name,
    }
    # The protocol's own check would need an instance before Python 3.12.
    stateful = all(hasattr(weighting_class, name) for name in _STATEFUL_METHODS)
    base = _StatefulComposedAggregator if stateful else ComposedAggregator
    return type(class_name, (base,), namespace)


def _restore(qualified_name: str, weighting: Weighting) -> ComposedAggregator:
    from jdcore._registry import registry  # the registry composes, so it imports this module

    cls: type[ComposedAggregator] = registry.aggregator_class(qualified_name)
    aggregator = cls.__new__(cls)
    GramianAggregator.__init__(aggregator, weighting)
    return aggregator
