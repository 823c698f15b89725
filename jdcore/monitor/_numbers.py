from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation._observation import Residuals, worst_of
from jdcore.linalg._conflicts import ROUNDING, angles_of, score_of, share_of

Floats: TypeAlias = NDArray[np.float64]


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


def numbers_of(
    weights: list[float] | Tensor | None,
    gramian: Tensor | Floats | None,
    update: tuple[Tensor, Tensor] | None,
    scale: float,
    cosines: bool,
    residuals: Residuals,
) -> Numbers:
    """
    Make the numbers of a weighing from its tensors; on an accelerator, this waits for them.

    :param weights: Weights [m], on an accelerator if they are a Tensor; None for a method that has
        none.
    :param gramian: Gramian [m, m] of the rows divided by ``scale``, in float64, as a Tensor or an
        array; None if nobody asked for it.
    :param update: Inner products [m] of the update with the rows and the square of its length, all
        vectors divided by ``scale``, in float64; None where they follow from the weights.
    :param scale: A power of two.
    :param cosines: Whether all cosines are kept.
    :param residuals: What measures the residuals of the problems that were solved.
    """
    numbers = weights.tolist() if isinstance(weights, Tensor) else weights
    residual = worst_of(residuals)
    if gramian is None:
        return Numbers(weights=numbers, residual=residual)
    matrix = gramian.cpu().numpy() if isinstance(gramian, Tensor) else gramian
    angles, norms = angles_of(matrix), np.sqrt(matrix.diagonal())
    products, square = _products(matrix, numbers) if update is None else _on_host(*update)
    # A product that is negative by rounding alone is no conflict: near stationarity, half of all
    # would be.
    conflicts = products < -ROUNDING * math.sqrt(max(square, 0.0)) * norms
    # Squares of float64 rows may leave the range although the rows do not: infinity is then what is
    # told.
    with np.errstate(over="ignore"):
        norms, products = norms * scale, products * scale * scale
    return Numbers(
        weights=numbers,
        norms=norms.tolist(),
        products=products.tolist(),
        conflicts=float(np.count_nonzero(conflicts)) / max(len(conflicts), 1),
        conflicting_pairs=share_of(angles),
        alignment=score_of(angles),
        cosines=angles.tolist() if cosines else None,
        residual=residual,
    )


def _products(gramian: Floats, weights: list[float] | None) -> tuple[Floats, float]:
    # Of the update u = Jᵀ w: J u = G w, and its squared length is w · G w.
    vector = np.array(weights, dtype=np.float64)
    inner: Floats = gramian @ vector
    return inner, float(inner @ vector)


def _on_host(products: Tensor, square: Tensor) -> tuple[Floats, float]:
    return products.cpu().numpy(), square.item()
