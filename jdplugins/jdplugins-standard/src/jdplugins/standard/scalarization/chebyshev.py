from __future__ import annotations

from attrs import define, field
from torch import Tensor

from jdcore.scalarization import LossScalarizer
from jdcore.validators import row_vector
from jdplugins.standard.scalarization._references import above, preferred


@define(eq=False)
class Chebyshev(LossScalarizer):
    """
    The largest weighted distance from a reference point, ``max_i w_i (L_i - z_i)``.

    Known as the Tchebycheff scalarization, see `Nonlinear Multiobjective Optimization
    <https://link.springer.com/book/10.1007/978-1-4615-5563-6>`_.

    In contrast to a weighted sum its minima reach every Pareto-optimal point. Only the largest term
    has a gradient at a time; :class:`STCH <jdcore.scalarization.STCH>` is its smooth form.

    :param pref_vector: Weights w, Tensor [m]. None stands for 1/m each.
    :param reference: Reference point z, Tensor [m], such as the least losses. None stands for zero.

    >>> import torch
    >>> from jdcore.scalarization import Chebyshev
    >>> Chebyshev(pref_vector=torch.tensor([3.0, 1.0]))(torch.tensor([1.0, 2.0]))
    tensor(3.)
    """

    pref_vector: Tensor | None = field(default=None, validator=row_vector)
    reference: Tensor | None = field(default=None, validator=row_vector)

    def scalarize(self, losses: Tensor) -> Tensor:
        return (preferred(losses, self.pref_vector) * above(losses, self.reference)).amax()
