from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import Columns, HistoryAggregator, portions, state_field
from jdcore.validators import integer, real
from jdplugins.standard._simplex import kept_weights, no_weights, softmax, weights_state

_LARGEST = 1e300  # so that sums and differences are numbers


@define(eq=False)
class ExcessMTL(HistoryAggregator):
    """
    Weights that grow with the excess risk, the loss that an objective may still lose.

    The excess risk of objective i is estimated as ``E_i = Σ g² / √(Σ_t g²)``, over its entries g of
    the row and the calls t so far: a Newton decrement with the Hessian that AdaGrad takes. Relative
    to a baseline ``B_i`` it raises the weights, ``w_i ← w_i exp(η E_i / B_i)``, scaled to sum 1;
    the update is ``Jᵀ w``. From `Robust Multi-Task Learning with Excess Risks
    <https://proceedings.mlr.press/v235/he24n.html>`_.

    Choose it where labels are noisy: a noisy objective has a large loss, which its irreducible part
    explains, but no large excess risk.

    The baseline is the mean estimate of the warm-up, without one the first estimate. All estimates
    are relative to it, the first one too (the authors' code exponentiates that one as it is, which
    lets the longest row take all the weight in a network of any size). So the scales of the rows do
    not matter. An objective whose baseline is zero keeps its share until its row is not.

    Stateful: weights, baseline, and the root of the sum of squares [m, n].

    :param robust_step_size: Step size η of the weights.
    :param n_warmup_steps: Number of calls that only measure, with weights 1/m; the authors
        recommend three epochs.
    :raises ParameterError: At a call, if the number of rows is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import ExcessMTL
    >>> aggregator = ExcessMTL()
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([0.5000, 1.0000])
    """

    combines_history: ClassVar[bool] = False

    robust_step_size: float = field(default=1.0, validator=real(0.0))
    n_warmup_steps: int = field(default=0, validator=integer(0))
    logarithms: Tensor = state_field(no_weights)
    baseline: Tensor = weights_state()
    calls: int = state_field(int, validator=integer(0))

    def advance(self, rows: Tensor, history: Tensor | None, losses: Tensor | None) -> Tensor:
        del losses
        return rows.abs() if history is None else torch.hypot(history, rows)

    def weigh_rows(
        self, rows: Columns, history: Columns, losses: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        del losses
        pairs = zip(rows.blocks, history.blocks, strict=True)
        total = torch.stack([_excess(*pair) for pair in pairs]).sum(dim=0)
        risks = total.clamp_max_(_LARGEST).cpu().numpy()
        logarithms = kept_weights(self.logarithms, len(risks), "matrix")
        logarithms = np.zeros_like(risks) if logarithms is None else logarithms
        baseline = kept_weights(self.baseline, len(risks), "matrix")
        warming = self.calls < self.n_warmup_steps
        if warming or baseline is None:
            share = max(1, self.n_warmup_steps)
            baseline = risks / share + (0.0 if baseline is None else baseline)
        if not warming:
            # An objective that has not moved yet has no scale: its estimate counts as typical.
            with np.errstate(over="ignore"):
                ratios = np.divide(risks, baseline, out=np.ones_like(risks), where=baseline > 0.0)
                rises = self.robust_step_size * ratios
            baseline = np.where(baseline > 0.0, baseline, risks)
            logarithms = logarithms + np.minimum(rises, _LARGEST)
            # The softmax stays the same, and the logarithms do not grow from call to call.
            logarithms = np.maximum(logarithms - logarithms.max(), -_LARGEST)
        return torch.from_numpy(softmax(logarithms)), {
            "logarithms": torch.from_numpy(logarithms),
            "baseline": torch.from_numpy(baseline),
            "calls": self.calls + 1,
        }


def _excess(rows: Tensor, history: Tensor) -> Tensor:
    """``Σ g² / h`` of each row, in an order that neither overflows nor divides zero by zero."""
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    for cut in portions(rows):
        some = rows[:, cut]
        # Where h is zero, g is, and zero by zero becomes the only NaN there can be.
        shares = (some / history[:, cut]).nan_to_num_(0.0)
        total += torch.linalg.vecdot(shares.double(), some.double())
    return total
