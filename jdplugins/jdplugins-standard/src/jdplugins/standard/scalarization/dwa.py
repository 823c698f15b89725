from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import StateFields, not_traced, state_field
from jdcore.errors import ParameterError
from jdcore.scalarization import LossScalarizer
from jdcore.validators import integer
from jdplugins.standard.scalarization._fields import (
    nothing,
    positive,
    require_as_many,
    vector_state,
)


@define(eq=False)
class DWA(StateFields, LossScalarizer):
    """
    Dynamic weight average: losses that fall slowly weigh more, from epoch to epoch.

    The weights are ``m softmax(r / T)``, where ``r_i`` is the mean of loss i in the last epoch
    divided by that in the epoch before; 1 each in the first two epochs. From `End-to-End Multi-Task
    Learning with Attention <https://arxiv.org/pdf/1803.10704>`_.

    Stateful: call :meth:`step` at the end of each epoch. All calls between two :meth:`reset` must
    have the same number of losses.

    :param temperature: T > 0; the larger, the more equal the weights.

    >>> import torch
    >>> from jdcore.scalarization import DWA
    >>> scalarizer = DWA()
    >>> for losses in ([4.0, 4.0], [2.0, 4.0]):  # two epochs of one batch
    ...     _ = scalarizer(torch.tensor(losses))
    ...     scalarizer.step()
    >>> scalarizer(torch.tensor([1.0, 0.0]))  # 2 e^(1/4) / (e^(1/4) + e^(1/2))
    tensor(0.8756)
    """

    temperature: float = field(default=2.0, validator=positive)
    total: Tensor = vector_state()
    count: int = state_field(int, validator=integer(0))
    last: Tensor = vector_state()
    before_last: Tensor = vector_state()

    @not_traced
    def scalarize(self, losses: Tensor) -> Tensor:
        values = losses.detach().double().cpu()
        require_as_many(self.total, len(values))
        require_as_many(self.last, len(values))
        result = self._weights(len(values)).to(losses) @ losses
        if torch.isfinite(values).all():
            self.total = self.total + values if self.count else values
            self.count += 1
        return result

    @not_traced
    def step(self) -> None:
        """
        End an epoch: the means of the losses since the last call become the latest ones.

        :raises ParameterError: If there were no losses since then.
        """
        if not self.count:
            raise ParameterError("losses", "given before an epoch ends", "none")
        self.before_last, self.last = self.last, self.total / self.count
        self.total, self.count = nothing(), 0

    def _weights(self, m: int) -> Tensor:
        if not len(self.before_last):
            return torch.ones(m, dtype=torch.float64, device="cpu")
        # A loss that was zero, and still is, has not changed.
        ratios = torch.where(self.last == self.before_last, 1.0, self.last / self.before_last)
        # One that was zero, and no longer is, has grown beyond all others, not beyond all numbers.
        largest = torch.finfo(ratios.dtype).max
        return m * (ratios / self.temperature).clamp(-largest, largest).softmax(0)
