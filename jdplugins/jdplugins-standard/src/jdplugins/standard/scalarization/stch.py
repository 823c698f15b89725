from __future__ import annotations

from attrs import define, field
from torch import Tensor

from jdcore.scalarization import LossScalarizer
from jdcore.validators import row_vector
from jdplugins.standard.scalarization._fields import positive
from jdplugins.standard.scalarization._references import above, preferred


@define(eq=False)
class STCH(LossScalarizer):
    """
    Smooth Chebyshev scalarization, ``μ log Σ_i exp(w_i (L_i - z_i) / μ)``.

    From `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
    <https://arxiv.org/pdf/2402.19078>`_.

    Choose it to reach any Pareto-optimal point, also where the front is not convex, at the price of
    gradient descent. It tends to :class:`Chebyshev <jdcore.scalarization.Chebyshev>` as μ tends to
    zero, and exceeds it by ``μ log m`` at most.

    :param mu: Smoothing μ > 0, in units of the weighted losses.
    :param pref_vector: Weights w, Tensor [m]. None stands for 1/m each.
    :param reference: Reference point z, Tensor [m], such as the least losses. None stands for zero.

    >>> import torch
    >>> from jdcore.scalarization import STCH
    >>> STCH(mu=1.0)(torch.tensor([0.0, 0.0]))  # log 2
    tensor(0.6931)
    """

    mu: float = field(default=1.0, validator=positive)
    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    reference: Tensor | None = field(default=None, validator=row_vector)

    def scalarize(self, losses: Tensor) -> Tensor:
        terms = preferred(losses, self.pref_vector) * above(losses, self.reference)
        # Quotients as large as terms over μ would be rounded by more than one, or overflow; their
        # distances from the largest one are not, in float64.
        largest = terms.detach().amax()
        exponents = (terms - largest).double() / self.mu
        return largest + (self.mu * exponents.logsumexp(0)).to(losses.dtype)
