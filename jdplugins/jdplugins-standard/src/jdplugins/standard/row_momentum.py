from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import (
    Columns,
    GramianSource,
    HistoryAggregator,
    NestedState,
    as_weighting,
    weigh,
)
from jdcore.protocols import Weighting
from jdcore.validators import real


@define(eq=False)
class RowMomentum(NestedState, HistoryAggregator):
    """
    Another method on the moving averages of the rows: ``Y ← β Y + (1 - β) J``.

    The noise of the batches is averaged out before the method looks for conflicts, not after, as
    the momentum of an optimizer does. The update is that of the method for Y. As `Mitigating
    Gradient Bias in Multi-objective Learning: A Provably Convergent Approach
    <https://openreview.net/pdf?id=dLAYGdKTi2>`_ tracks the rows, for any method.

    Choose it where batches are small and there is memory for one more Jacobian. A method that looks
    at two batches sees the products of Y with the rows of the second, of which Y holds nothing.

    Stateful: Y [m, n], the rows themselves at first, and the state of the wrapped method.

    :param weighting: The wrapped :class:`~jdcore.Weighting`, or an aggregator made of one.
    :param beta: Weight β of the past, in [0, 1).
    :raises ParameterError: In a call, if the shape of the Jacobian is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import RowMomentum, SumWeighting
    >>> aggregator = RowMomentum(SumWeighting(), beta=0.5)
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([1., 2.])
    >>> aggregator(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    tensor([2., 2.])
    """

    # The fields of the base are no positional arguments, which the type checker does not see.
    weighting: Weighting = field(converter=as_weighting)  # type: ignore[misc]
    beta: float = field(default=0.9, validator=real(0.0, below=1.0))

    @property
    def scale_degree(self) -> float:  # type: ignore[override]  # that of the wrapped method
        degree: float = getattr(self.weighting, "scale_degree", 0)
        return degree

    def inner_parts(self) -> dict[str, Any]:
        """The wrapped method."""
        return {"weighting": self.weighting}

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        del losses
        return rows if history is None else torch.lerp(rows, history, self.beta)

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        del rows
        return weigh(self.weighting, GramianSource.of_columns(history, losses)), {}
