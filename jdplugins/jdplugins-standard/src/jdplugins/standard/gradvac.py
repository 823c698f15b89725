from __future__ import annotations

import numpy as np
import torch
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import GramianWeighting, StateFields, state_field
from jdcore.errors import ParameterError
from jdcore.linalg import equilibrate
from jdcore.validators import describe_tensor, generator, real
from jdplugins.standard._surgery import permutations, summed_rows

# Below the sine of any angle whose cosine differs from 1 in float64.
_LEAST_SINE = 1e-8


def _cosines(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if value.ndim != 2 or value.shape[0] != value.shape[1]:
        raise ParameterError(attribute.name, "a square matrix", describe_tensor(value))
    largest = np.abs(value.numpy(force=True)).max(initial=0.0)
    if largest > 1.0:
        raise ParameterError(attribute.name, "a matrix of cosines", f"{largest:g} in it")


def _no_targets() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.float64, device="cpu")


@define(eq=False)
class GradVacWeighting(StateFields, GramianWeighting):
    """
    Gradient vaccine: pairs of rows are brought to the cosine they have had on average.

    Each row visits the others in a random order of its own. Where the cosine φ of its present
    version with the row visited is below the target of this pair, the multiple of the visited row
    is added that brings it up to the target. Then the target moves:
    ``target ← (1 - β) target + β φ``. The update is the sum of the modified rows. From `Gradient
    Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models
    <https://arxiv.org/pdf/2010.05874>`_.

    Targets start at 0, so the first update is one of :class:`PCGrad
    <jdcore.aggregation.PCGrad>`. Choose it over that method where objectives are related, to keep
    them aligned even when they do not conflict.

    Nothing is added to denominators: cosines are those of the rows at any scale. A zero row has
    the cosine 0 with all others.

    Stateful: ``phi`` [m, m] holds the targets. All calls between two :meth:`reset` must have the
    same number of objectives.

    :param beta: Weight of the present cosine in the moving average, in [0, 1].
    :param generator: Source of the random orders, on any device; the default generator of torch if
        None.
    :raises ParameterError: At a call, if the number of rows is not that of the call before.

    >>> import torch
    >>> from jdcore.aggregation import GradVac
    >>> aggregator = GradVac(beta=0.5)
    >>> aggregator(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.5000])
    >>> aggregator.weighting.phi
    tensor([[ 0.0000, -0.3536],
            [-0.3536,  0.0000]], dtype=torch.float64)
    """

    beta: float = field(default=0.5, validator=real(0.0, 1.0))
    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )
    phi: Tensor = state_field(_no_targets, validator=_cosines)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        m = len(gramian)
        phi = self._targets(m)
        cosines, norms, inverses = equilibrate(gramian)
        rows = np.arange(m)[:, None]
        orders = permutations(m, m - 1, self.generator)
        # Numbers from the row itself on are one more, which leaves it out.
        orders += orders >= rows
        targets = phi[rows, orders]
        coefficients, measured = _vaccinate(cosines, orders, targets)
        phi[rows, orders] = (1.0 - self.beta) * targets + self.beta * measured
        self.phi = torch.from_numpy(phi)
        return summed_rows(coefficients, norms, inverses)

    def _targets(self, m: int) -> NDArray[np.float64]:
        known = len(self.phi)
        if not known:
            return np.zeros((m, m))
        if known != m:
            raise ParameterError(
                "gramian",
                f"of {known} objectives, as in the calls before",
                f"one of {m}",
                "Call reset() before the number of objectives changes.",
            )
        phi: NDArray[np.float64] = self.phi.numpy().copy()
        return phi


def _vaccinate(
    cosines: NDArray[np.float64], orders: NDArray[np.int64], targets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Take all visits.

    :param orders: For each row i an order of all rows but i, [m, m - 1].
    :param targets: Target cosine of each visit [m, m - 1].
    :returns: The modified rows in terms of the rows of length 1, see :func:`summed_rows`, and the
        cosine found at each visit [m, m - 1].
    """
    m = len(cosines)
    rows = np.arange(m)
    nonzero = np.diagonal(cosines) > 0.0
    lengths = nonzero.astype(np.float64)  # of the modified rows, in units of the original lengths
    coefficients = np.eye(m)
    visited = np.empty_like(cosines)
    measured = np.empty_like(targets)
    eligible = nonzero[orders]
    target_sines = np.maximum(np.sqrt((1.0 - targets) * (1.0 + targets)), _LEAST_SINE)
    for k in range(m - 1):
        others, target, target_sine = orders[:, k], targets[:, k], target_sines[:, k]
        cosines.take(others, axis=0, out=visited)
        products = np.einsum("ij,ij->i", coefficients, visited)
        found = np.zeros(m)
        np.divide(products, lengths, out=found, where=lengths > 0.0)
        found = np.minimum(np.maximum(found, -1.0), 1.0)
        # Not 1 - φ², which loses digits near one.
        sine = np.sqrt((1.0 - found) * (1.0 + found))
        below = (found < target) & eligible[:, k]
        stretch = np.where(below, lengths / target_sine, 0.0)
        coefficients[rows, others] = stretch * (target * sine - found * target_sine)
        # The part orthogonal to the visited row stays as it is.
        lengths = np.where(below, stretch * sine, lengths)
        measured[:, k] = found
    return coefficients, measured
