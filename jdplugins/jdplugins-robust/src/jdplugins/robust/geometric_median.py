from __future__ import annotations

import math

import numpy as np
from attrs import define
from numpy.typing import NDArray

from jdcore.aggregation import GramianWeighting
from jdcore.errors import UnsolvedWarning, warn
from jdcore.linalg import solve, squared_distances

_EPS = 2.0**-52
_STEPS = 500
_PATIENCE = 20  # steps without any gain
_PROMISED = 1e-10
# Sums of distances that differ by less are equal but for rounding.
_EQUAL = 1e-13


@define(eq=False)
class GeometricMedianWeighting(GramianWeighting):
    """
    Geometric median: the vector with the least sum of distances to all rows.

    From `Robust Aggregation for Federated Learning <https://arxiv.org/pdf/1912.13445>`_, which
    computes it by the algorithm of Weiszfeld. Here it is exact to float64 accuracy: a row that is
    the median itself is recognised by its optimality condition, otherwise the iteration of
    Weiszfeld is accelerated by Newton steps. No distance is smoothed.

    Choose it when any minority of the rows may be anything and its size is not known. In contrast
    to :class:`CoordinateWiseMedian <jdcore.aggregation.CoordinateWiseMedian>` it does not depend on
    the coordinate system and works with autogram. Where several vectors have the least sum (an even
    number of rows on one line), it is the mean of the rows among them. Rows closer to each other
    than 1e-8 of their norm count as equal, as their distance cannot be seen in float64 Gramians.

    >>> import torch
    >>> from jdcore.aggregation import GeometricMedian
    >>> GeometricMedian()(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [900.0, 900.0]]))
    tensor([1., 1.])
    """

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        distances = _distinct(gramian)
        sums = np.sqrt(distances).sum(axis=1)
        centre = int(np.argmin(sums))
        # Seen from the most central row, rows far from all others cost the near ones no digit.
        products = gramian - gramian[centre] - gramian[:, centre, None] + gramian[centre, centre]
        np.fill_diagonal(products, distances[centre])
        here = distances[centre] == 0.0
        products[here] = products[:, here] = 0.0
        pull, weights = _pull(products, here)
        # What rounding of the Gramian leaves of distances that are short beside the rows.
        noise = _noise(gramian, distances)
        # A row is the median itself where all others together, each pulling with the force one,
        # do not outweigh the rows that lie there.
        if pull <= here.sum() * (1.0 + max(_EQUAL, _EPS * float(noise[centre].sum()) ** 2)):
            of_sums = 4.0 * _EPS * (noise * noise * np.sqrt(distances)).sum(axis=1)
            equal = np.maximum(_EQUAL * sums[centre], of_sums + of_sums[centre])
            return _shared(distances, sums <= sums[centre] + equal)
        # The step of Weiszfeld, shortened by the resistance of the rows at the starting point.
        resistance = here.sum() / pull
        start = (1.0 - resistance) * weights + resistance * here / here.sum()
        weights, residual = _iterate(products, start)
        if residual > _PROMISED:
            reason = "the iteration came to a halt"
            warn(UnsolvedWarning("geometric_median", residual, reason))
        return weights


def _distinct(gramian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances, zero where rounding leaves nothing of them."""
    distances = squared_distances(gramian)
    squared_norms = np.diagonal(gramian)
    # Of equal rows, rounding leaves a distance that would count as a direction.
    distances[distances <= 4.0 * _EPS * (squared_norms[:, None] + squared_norms)] = 0.0
    return distances


def _noise(gramian: NDArray[np.float64], distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths of pairs of rows relative to their distance [m, m]; 0 for rows that are equal."""
    norms, lengths = np.sqrt(np.diagonal(gramian)), np.sqrt(distances)
    ratios = np.zeros_like(lengths)
    np.divide(norms[:, None] + norms, lengths, out=ratios, where=lengths > 0.0)
    return ratios


def _pull(
    products: NDArray[np.float64], here: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """
    Length of the sum of the unit vectors from a row to all rows elsewhere, and their weights.

    :param products: Inner products [m, m] of the rows, seen from this row.
    :param here: Which rows coincide with it.
    """
    inverses = np.zeros(len(here))
    inverses[~here] = 1.0 / np.sqrt(np.diagonal(products)[~here])
    squared = inverses @ (products * inverses).sum(axis=1)
    # All rows may lie here, which leaves none to pull.
    return float(np.sqrt(max(squared, 0.0))), inverses / max(inverses.sum(), 1e-300)


def _shared(distances: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights of the mean of the positions of the chosen rows, each counted once."""
    coinciding = (distances == 0.0) & chosen
    shares = chosen / np.maximum(coinciding.sum(axis=1), 1)
    weights: NDArray[np.float64] = shares / shares.sum()
    return weights


def _iterate(
    products: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """
    Improve a point that lies at no row until its derivative vanishes.

    :param products: Inner products [m, m] of the rows.
    :param weights: Positive weights [m] of the point, with sum 1.
    :returns: Weights, and the norm of the derivative of the mean distance.
    """
    best, least, idle = weights, np.inf, 0
    for _ in range(_STEPS):
        distances = _distances(products, weights)
        stepped = _normalised(-np.log(distances))
        residual = _length(products, stepped - weights) * float((1.0 / distances).mean())
        idle = 0 if residual < least else idle + 1
        if not idle:
            best, least = stepped, residual
        # Rounding keeps the residual from vanishing: it falls for a while and then wanders.
        if residual <= _EPS or idle == _PATIENCE:
            break
        # Newton's steps are few near the median, and may go anywhere far from it.
        # Those of Weiszfeld never make the sum longer.
        newton = _newton(products, weights, distances)
        shorter = _distances(products, newton).sum() <= distances.sum() * (1.0 + _EQUAL)
        weights = newton if shorter else stepped
    return best, least


def _distances(products: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances [m] of the rows from the point of the given weights, none of them zero."""
    offsets = products @ weights
    squared = np.diagonal(products) - 2.0 * offsets + weights @ offsets
    # Not zero, as their logarithms are taken.
    return np.sqrt(np.maximum(squared, 1e-300))


def _length(products: NDArray[np.float64], coefficients: NDArray[np.float64]) -> float:
    return math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))


def _normalised(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
    # The largest becomes one, so that no power overflows.
    weights = np.exp(logarithms - logarithms.max())
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def _newton(
    products: NDArray[np.float64], weights: NDArray[np.float64], distances: NDArray[np.float64]
) -> NDArray[np.float64]:
    """
    Weights after a Newton step for the fixed point of Weiszfeld's iteration, log w = -log d.

    In logarithms the weights stay positive, and those of far rows are as exact as any.
    """
    slopes = (products - products @ weights) / (distances**2)[:, None]
    derivative = slopes * weights - (slopes @ weights)[:, None] * weights
    logarithms = np.log(weights)
    missing = -np.log(distances) - logarithms
    missing -= missing @ weights  # a common factor of all weights makes no difference
    try:
        step = solve(np.eye(len(weights)) - derivative, missing[:, None])[:, 0]
    except np.linalg.LinAlgError:  # rows that are nearly on one line
        return _normalised(-np.log(distances))
    return _normalised(logarithms + step)
