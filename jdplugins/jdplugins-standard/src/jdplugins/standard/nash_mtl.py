from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from attrs import define, field
from attrs.validators import optional
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import (
    GramianSource,
    GramianWeighting,
    StateFields,
    solution,
    solver_field,
    state_field,
)
from jdcore.errors import ParameterError
from jdcore.protocols import NashBargainingSolver
from jdcore.validators import integer, real
from jdplugins.standard._simplex import weights_state


@define(eq=False)
class NashMTLWeighting(StateFields, GramianWeighting):
    """
    The Nash bargaining solution: every objective gets the same relative gain.

    The weights α > 0 solve ``G α = 1/α``. The update ``Jᵀ α`` then has a positive inner product
    with every row, does not change when a row is multiplied by a positive number, and has the
    length ``√m`` whatever the length of the rows. From `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/pdf/2202.01017>`_.

    Choose it when losses have incomparable scales. Because the length says nothing about the
    distance from a stationary point, decrease the learning rate over time. At a Pareto-stationary
    point (a non-negative combination of non-zero rows is zero) there is no solution; the rows
    concerned are then left aside, and the others bargain orthogonally to them. Zero rows get weight
    zero.

    The equation is solved exactly, so there is no number of solver iterations to choose. The
    authors' code solves it for ``G / |G|`` instead, which gives the same direction, but an update
    shorter than ``max_norm`` where the rows are short.

    Stateful: the weights are kept, for the calls between updates if ``update_weights_every > 1``,
    and for a solver that starts from them.

    :param n_tasks: Number of objectives. Not needed; if given, it is checked at each call.
    :param max_norm: Largest length of the update ``Jᵀ α``; longer ones are shortened to it. As the
        length is ``√m``, the default gives updates of length 1. 0 means no limit.
    :param update_weights_every: Solve at every k-th call, and reuse the weights (but apply
        ``max_norm`` anew) in between.
    :param solver: Name or instance of a ``"nash_bargaining"`` solver.
    :raises ParameterError: At a call, if the number of rows is not ``n_tasks``, or weights of
        another number of rows are to be reused.

    >>> import torch
    >>> from jdcore.aggregation import NashMTL
    >>> NashMTL()(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
    tensor([0.7071, 0.7071])
    """

    scale_degree: ClassVar[int] = -1

    n_tasks: int | None = field(default=None, validator=optional(integer(1)))
    max_norm: float = field(default=1.0, validator=real(0.0))
    update_weights_every: int = field(default=1, validator=integer(1))
    solver: NashBargainingSolver | str = solver_field("nash_bargaining")
    calls: int = state_field(int, validator=integer(0))
    alpha: Tensor = weights_state()

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        gramian, scale = source.definite(gramian), source.scale()
        m = len(gramian)
        if self.n_tasks not in (None, m):
            raise ParameterError(
                "n_tasks", f"{m}, the number of objectives", self.n_tasks, "It can be left out."
            )
        if self.calls % self.update_weights_every == 0:
            # Weights of another number of objectives are nothing to start from.
            start = self.alpha.numpy() * scale if len(self.alpha) == m else None
            given = gramian, start, source.proximal_level
            alpha = solution("nash_bargaining", self.solver, (m,), *given)
        else:
            alpha = self._reused(m) * scale
        # What is kept are weights of the rows themselves, where the Gramian is that of rows divided
        # by the scale. Those of rows below 1e-308 are no numbers: the next call solves anew.
        with np.errstate(over="ignore"):
            kept = alpha / scale
        # Only now, so that a solver that fails leaves the state as it was.
        if np.isfinite(kept).all():
            self.calls += 1
            self.alpha = torch.from_numpy(kept)
        return self._shorten(alpha, gramian)

    def _reused(self, m: int) -> NDArray[np.float64]:
        if len(self.alpha) != m:
            raise ParameterError(
                "gramian",
                f"of {len(self.alpha)} objectives, as when the weights were last updated",
                f"one of {m}",
                "Call reset() before the number of objectives changes.",
            )
        alpha: NDArray[np.float64] = self.alpha.numpy()
        return alpha

    def _shorten(
        self, alpha: NDArray[np.float64], gramian: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        # Weights that are reused for rows of another scale may be large beyond any square.
        unit = float(alpha.max()) or 1.0
        shares = alpha / unit
        # Rounding may make the square of a length near zero negative.
        length = unit * math.sqrt(max(float(shares @ gramian @ shares), 0.0))
        factor = self.max_norm / length if 0.0 < self.max_norm < length else 1.0
        # A new array: the state must not change with what the caller does to the result.
        weights: NDArray[np.float64] = factor * alpha
        return weights
