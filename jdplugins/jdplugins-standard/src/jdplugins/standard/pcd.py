from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianSource, GramianWeighting, StateFields
from jdcore.errors import ParameterError
from jdcore.linalg import add_proximal, equilibrate
from jdcore.validators import describe_tensor, holds_real_numbers, real
from jdplugins.standard._simplex import kept_weights, weights_state
from jdplugins.standard._solvers import solve_one

# Multipliers of unit rows that stand for none: those of conditions that two rows opposite up to an
# angle of 1e-5 make. Larger ones would let rounding of the cosines decide the direction.
_INFEASIBLE = 1e10
_UNSOLVED = 1e-9
_MISSED = 1e-2  # part of what is demanded that conditions may miss by the proximal term
_ROUNDED = 2.0  # squared length that rounding leaves, relative to what the proximal term adds


def _fraction(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, Tensor):
        real(0.0, 1.0)(instance, attribute, value)
        return
    expected = "in [0, 1], or a vector of such numbers, one per secondary objective"
    if not holds_real_numbers(value) or value.ndim != 1 or not value.is_floating_point():
        raise ParameterError(attribute.name, expected, describe_tensor(value))
    if not bool(((value >= 0.0) & (value <= 1.0)).all()):
        raise ParameterError(attribute.name, expected, value.tolist())


@define(eq=False)
class PCDWeighting(StateFields, GramianWeighting):
    """
    Priority-constrained descent: the first row, and some progress for all others.

    With the rows scaled by their typical lengths, ``u_i = g_i / r_i``, the direction d is the
    vector closest to u_1 with ``u_j · d >= τ_j ‖u_j‖²`` for all others: each secondary objective
    gets at least the fraction τ_j of what a step along its own gradient would give. The update is
    ``‖g_1‖ d / ‖d‖``. From `Not All Objectives Are Born Equal: Priority-Constrained Descent for
    Hierarchical Multi-Objective Optimization <https://arxiv.org/pdf/2606.29521>`_.

    Choose it where one objective is what training is for, and others are constraints or auxiliary
    tasks. Put the primary objective first.

    The typical length of a row is the root of the moving average of its squared norm,
    ``r² ← β r² + (1 - β) ‖g‖²``. The paper corrects its bias and adds 1e-8 to it; the correction
    leaves d as it is, and nothing is added here: rows may have any scale.

    If g_1 is zero, or d is, the update is zero. If no d satisfies the conditions (as for two
    secondary rows that are opposite, or are so up to an angle of about 1e-5), they are dropped and
    the update is g_1.

    Stateful: the typical lengths.

    :param tau: Fraction τ in [0, 1] for all secondary objectives, or a Tensor [m - 1].
    :param beta: Weight β of the past in the typical lengths, in [0, 1).
    :raises ParameterError: At a call, if the length of ``tau`` is not m - 1, or the number of rows
        has changed since the first call.

    >>> import torch
    >>> from jdcore.aggregation import PCD
    >>> PCD(tau=0.0)(torch.tensor([[1.0, 1.0], [-2.0, 0.0]])).round(decimals=4)
    tensor([0.0000, 1.4142])
    """

    tau: float | Tensor = field(default=0.02, validator=_fraction)
    beta: float = field(default=0.999, validator=real(0.0, below=1.0))
    lengths: Tensor = weights_state()

    def compute_from(
        self, gramian: NDArray[np.float64], source: GramianSource
    ) -> NDArray[np.float64]:
        m = len(gramian)
        taus = self._taus(m)
        cosines, norms, inverses = equilibrate(gramian)
        old = kept_weights(self.lengths, m)
        # In this unit the lengths of rows stay in the range of float64, which they may leave.
        unit = max(source.scale(), 1.0)
        lengths = norms * min(source.scale(), 1.0)
        fresh = math.sqrt(1.0 - self.beta) * lengths
        # Roots of sums of squares, formed so that no square leaves the range of float64.
        typical = fresh if old is None else np.hypot(math.sqrt(self.beta) * old / unit, fresh)
        weights = np.zeros(m)
        if norms[0] > 0.0:
            # Lengths near the end of float64 have none that is typical: they are so themselves.
            relative = np.divide(lengths, typical, out=np.ones(m), where=typical > 0.0)
            level = source.proximal_level
            shares = _shares(cosines, taus * relative[1:] / relative[0], level)
            squared = float(shares @ cosines @ shares)
            if squared > _ROUNDED * level * float(shares @ shares):
                weights = shares * inverses * (norms[0] / math.sqrt(squared))
        with np.errstate(over="ignore"):
            kept = np.minimum(typical * unit, sys.float_info.max)
        self.lengths = torch.from_numpy(kept)
        return weights

    def _taus(self, m: int) -> NDArray[np.float64]:
        if not isinstance(self.tau, Tensor):
            return np.full(m - 1, float(self.tau))
        if len(self.tau) != m - 1:
            expected = f"of length {m - 1}, the number of secondary objectives"
            raise ParameterError("tau", expected, f"length {len(self.tau)}")
        taus: NDArray[np.float64] = self.tau.detach().double().cpu().numpy()
        return taus


def _shares(
    cosines: NDArray[np.float64], demands: NDArray[np.float64], level: float
) -> NDArray[np.float64]:
    """
    What of each unit row makes up d, in units of the length of u_1; [1, 0, ...] if there is none.

    :param cosines: Cosines of all rows [m, m]; the first row is not zero.
    :param demands: Least inner products of d with the other unit rows [m - 1].
    :param level: Squared length of a combination of unit rows that is rounding.
    """
    shares = np.zeros(len(cosines))
    shares[0] = 1.0
    rows = np.flatnonzero(np.diagonal(cosines))[1:]  # zero rows demand nothing
    q = cosines[rows, 0] - demands[rows - 1]
    scale = max(1.0, float(np.abs(q).max(initial=0.0)))
    if q.min(initial=0.0) >= 0.0:
        return shares
    # Multipliers without bound belong to conditions that cannot be satisfied; the proximal term
    # bounds them, and tells by how much the conditions are missed.
    z, residual = solve_one(add_proximal(cosines[np.ix_(rows, rows)], level), q / scale)
    largest = min(_INFEASIBLE, -_MISSED * float(q.min()) / (level * scale))
    if residual <= _UNSOLVED and z.max() < largest:
        shares[rows] = z * scale
    return shares
