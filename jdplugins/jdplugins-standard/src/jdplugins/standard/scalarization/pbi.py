from __future__ import annotations

from attrs import define, field
from torch import Tensor

from jdcore.scalarization import LossScalarizer
from jdcore.validators import real, row_vector
from jdplugins.standard.scalarization._references import above, direction, length, preferred


@define(eq=False)
class PBI(LossScalarizer):
    """
    Penalised boundary intersection: progress along a ray, and a penalty on leaving it.

    With r the unit vector of the preferences, ``d_1 = (L - z) · r`` and ``d_2 = ‖L - z - d_1 r‖``,
    it is ``d_1 + θ d_2``. From `MOEA/D: A Multiobjective Evolutionary Algorithm Based on
    Decomposition <https://ieeexplore.ieee.org/document/4358754>`_.

    Choose it to reach the Pareto-optimal point on a given ray from the reference point. Where the
    losses are on the ray the penalty has no derivative; its gradient is taken to be zero there.

    :param theta: Penalty θ.
    :param pref_vector: Direction of the ray, Tensor [m], not zero. None stands for equal
        preferences.
    :param reference: Reference point z, Tensor [m], such as the least losses. None stands for zero.

    >>> import torch
    >>> from jdcore.scalarization import PBI
    >>> PBI(theta=5.0, pref_vector=torch.tensor([1.0, 0.0]))(torch.tensor([3.0, 1.0]))
    tensor(8.)
    """

    theta: float = field(default=5.0, validator=real(0.0))
    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    reference: Tensor | None = field(default=None, validator=row_vector)

    def scalarize(self, losses: Tensor) -> Tensor:
        ray = direction(preferred(losses, self.pref_vector))
        offsets = above(losses, self.reference)
        progress = offsets @ ray
        return progress + self.theta * length(offsets - progress * ray)
