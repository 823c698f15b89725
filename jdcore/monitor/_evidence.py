from __future__ import annotations

import math

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

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


@frozen(kw_only=True, eq=False)
class Evidence:
    """
    The tensors of a weighing, from which its numbers can be made later.

    :param weights: Weights [m], None for a method that has none.
    :param gramian: Gramian [m, m] in float64, None if nobody asked for it.
    :param update: Inner products [m] of the update with the rows and the square of its length, in
        float64; None where they follow from the weights.
    :param cosines: Whether all cosines are kept.
    """

    weights: Tensor | None
    gramian: Tensor | None
    update: tuple[Tensor, Tensor] | None
    cosines: bool

    def numbers(self) -> Numbers:
        """Make the numbers; on an accelerator, this waits for them."""
        weights = None if self.weights is None else self.weights.tolist()
        if self.gramian is None:
            return Numbers(weights=weights)
        gramian = self.gramian.cpu().numpy()
        angles = angles_of(gramian)
        norms = np.sqrt(gramian.diagonal())
        products, square = self._update(gramian)
        conflicts = products < -ROUNDING * math.sqrt(max(square, 0.0)) * norms
        return Numbers(
            weights=weights,
            norms=norms.tolist(),
            products=products.tolist(),
            conflicts=float(np.count_nonzero(conflicts)) / max(len(conflicts), 1),
            conflicting_pairs=share_of(angles),
            alignment=score_of(angles),
            cosines=angles.tolist() if self.cosines else None,
        )

    def _update(self, gramian: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        if self.update is not None:
            products, square = self.update
            return products.cpu().numpy(), square.item()
        assert self.weights is not None
        weights = self.weights.double().cpu().numpy()
        inner: NDArray[np.float64] = gramian @ weights
        return inner, float(inner @ weights)
