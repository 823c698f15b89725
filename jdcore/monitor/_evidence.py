from __future__ import annotations

import math

import numpy as np
from attrs import define, frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation._observation import Residuals, worst_of
from jdcore.linalg._conflicts import ROUNDING, angles_of, score_of, share_of


@frozen(kw_only=True, eq=False)
class Numbers:
    """What a weighing tells of its gradients; :class:`~jdcore.monitor.Step` says what each is."""

    weights: list[float] | None = None
    norms: list[float] | None = None
    products: list[float] | None = None
    conflicts: float | None = None
    conflicting_pairs: float | None = None
    alignment: float | None = None
    cosines: list[list[float]] | None = None
    residual: float | None = None


@define(kw_only=True, eq=False)  # not frozen, which would take longer at every step
class Evidence:
    """
    The tensors of a weighing, from which its numbers can be made later. Nobody else writes to them.

    :param weights: Weights [m], on an accelerator if they are a Tensor; None for a method that has
        none.
    :param gramian: Gramian [m, m] of the rows divided by ``scale``, in float64; None if nobody
        asked for it.
    :param scale: A power of two.
    :param update: Inner products [m] of the update with the rows and the square of its length, all
        vectors divided by ``scale``, in float64; None where they follow from the weights.
    :param cosines: Whether all cosines are kept.
    :param residuals: What measures the residuals of the problems that were solved.
    """

    weights: list[float] | Tensor | None
    gramian: Tensor | None
    scale: float
    update: tuple[Tensor, Tensor] | None
    cosines: bool
    residuals: Residuals

    @property
    def excess(self) -> int:
        """Bytes of a Gramian that is too large to be kept for every step."""
        return 0 if self.cosines or self.gramian is None else 8 * self.gramian.numel()

    def numbers(self) -> Numbers:
        """Make the numbers; on an accelerator, this waits for them."""
        weights = self.weights.tolist() if isinstance(self.weights, Tensor) else self.weights
        residual = worst_of(self.residuals)
        if self.gramian is None:
            return Numbers(weights=weights, residual=residual)
        gramian = self.gramian.cpu().numpy()
        angles, norms = angles_of(gramian), np.sqrt(gramian.diagonal())
        products, square = self._update(gramian, weights)
        conflicts = products < -ROUNDING * math.sqrt(max(square, 0.0)) * norms
        with np.errstate(over="ignore"):
            norms, products = norms * self.scale, products * self.scale * self.scale
        return Numbers(
            weights=weights,
            norms=norms.tolist(),
            products=products.tolist(),
            conflicts=float(np.count_nonzero(conflicts)) / max(len(conflicts), 1),
            conflicting_pairs=share_of(angles),
            alignment=score_of(angles),
            cosines=angles.tolist() if self.cosines else None,
            residual=residual,
        )

    def _update(
        self, gramian: NDArray[np.float64], weights: list[float] | None
    ) -> tuple[NDArray[np.float64], float]:
        if self.update is not None:
            products, square = self.update
            return products.cpu().numpy(), square.item()
        vector = np.array(weights, dtype=np.float64)
        inner: NDArray[np.float64] = gramian @ vector
        return inner, float(inner @ vector)
