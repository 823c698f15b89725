from __future__ import annotations

from typing import Any, ClassVar

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import Columns, HistoryAggregator, state_field
from jdcore.errors import ParameterError
from jdcore.validators import integer, real
from jdplugins.standard._decay import decayed


@define(eq=False)
class DBMTL(HistoryAggregator):
    """
    Dual-balancing: gradients of the logarithms of the losses, averaged, and made equally long.

    The row of objective i is ``g_i / L_i``, the gradient of ``log L_i``; its moving average is
    ``Y ← β Y + (1 - β) J``; the update is the sum of the rows of Y, each lengthened to the longest.
    From `Dual-Balancing for Multi-Task Learning <https://arxiv.org/pdf/2308.12029>`_.

    Choose it where losses differ in scale and in how fast they fall: neither the values of the
    losses nor the lengths of the rows decide who is heard. Losses have to be positive. Zero rows
    stay zero.

    Stateful if β > 0: Y [m, n], zero at first.

    :param beta: Weight β of the past, in [0, 1). At 0 nothing of the size of J is kept.
    :param beta_sigma: Decay: the weight of the past at call k is ``β / k^beta_sigma``.
    :raises ParameterError: At a call, if losses are missing or not positive, or, if β > 0, the
        shape of the Jacobian is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import DBMTL
    >>> aggregator = DBMTL(beta=0.0)
    >>> aggregator(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), losses=torch.tensor([2.0, 1.0]))
    tensor([2., 2.])
    """

    looks_at_losses: ClassVar[bool] = True

    beta: float = field(default=0.9, validator=real(0.0, below=1.0))
    beta_sigma: float = field(default=0.0, validator=real(0.0))
    calls: int = state_field(int, validator=integer(0))

    @property
    def keeps_history(self) -> bool:
        return self.beta > 0.0

    def check_values(self, losses: Tensor) -> None:
        """
        Refuse losses that have no logarithm.

        :param losses: Values of the objectives [m].
        :raises ParameterError: If one is zero or negative.
        """
        if not bool((losses > 0.0).all()):
            expected = "positive: their logarithms are balanced"
            raise ParameterError("losses", expected, losses.tolist())

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        assert losses is not None  # the class looks at them
        # Calls are counted from one.
        past = decayed(self.beta, self.calls, self.beta_sigma)
        fresh: Tensor = (1.0 - past) * (rows / losses[:, None].to(rows))
        return fresh if history is None else fresh + past * history

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        del rows, losses
        norms = history.gramian().diagonal().sqrt()
        # A zero row adds nothing to the update, whatever its weight.
        weights = torch.where(norms > 0.0, norms.max() / norms, 0.0)
        return weights, {"calls": self.calls + 1}
