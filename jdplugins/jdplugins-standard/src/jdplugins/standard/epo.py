from __future__ import annotations

import math

import numpy as np
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import LossWeighting, row_weights
from jdcore.errors import ParameterError
from jdcore.validators import real, row_vector
from jdplugins.standard._linear_program import maximize_on_simplex

Floats = NDArray[np.float64]


@define(eq=False)
class EPOWeighting(LossWeighting):
    """
    Exact Pareto optimal search: descent towards the solution where losses are as preferred.

    The preferred solution is the Pareto optimum where the products of preferences and losses,
    ``r_i L_i``, are equal. How far the losses are from that is measured by
    ``μ = Σ p_i log(m p_i)``, with ``p_i = r_i L_i / Σ r_j L_j``. While ``μ > eps``, the weights
    maximise ``aᵀ G w`` with ``a_i = r_i (log(m p_i) - μ)``, the direction of steepest descent of μ:
    losses that are too large fall, others may rise, but the largest may not; and no more than that
    direction would make them. Then they maximise the descent of all, ``1ᵀ G w``, without conflict.
    From `Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in
    Pareto Optimization <https://proceedings.mlr.press/v119/mahapatra20a/mahapatra20a.pdf>`_.

    Choose it to reach a chosen point of the Pareto front, where weighting the losses reaches the
    convex part of the front only. Losses have to be positive.

    Each step solves a linear program over the simplex exactly. It always has a solution: the
    shortest vector in the convex hull satisfies its conditions.

    :param preference: Preferences r, Tensor [m] of positive numbers; equal ones if None.
    :param eps: μ up to which losses count as preferred.
    :raises ParameterError: At a call, if losses are missing, or these or preferences not positive.

    >>> import torch
    >>> from jdcore.aggregation import EPO
    >>> aggregator = EPO(preference=torch.tensor([1.0, 1.0]))
    >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), losses=torch.tensor([4.0, 1.0]))
    tensor([1., 0.])
    """

    preference: Tensor | None = field(default=None, validator=row_vector)
    eps: float = field(default=1e-4, validator=real(0.0))

    def compute_with(self, gramian: Floats, losses: Floats) -> Floats:
        m = len(gramian)
        preferences = self._preferences(m)
        if not (losses > 0.0).all():
            raise ParameterError(
                "losses", "positive: their logarithms are balanced", losses.tolist()
            )
        largest = float(np.diagonal(gramian).max())
        if not largest > 0.0:
            return np.full(m, 1.0 / m)
        # The linear program wants numbers of order one; its solution does not depend on their
        # scale.
        products = gramian / largest
        # By logarithms, as neither products of preferences and losses nor their sums need be in the
        # range of float64.
        logarithms = np.log(preferences) + np.log(losses)
        logarithms -= np.logaddexp.reduce(logarithms) - math.log(m)
        shares = np.exp(logarithms) / m
        imbalance = float(shares @ logarithms)
        if imbalance <= self.eps:
            return _solve(products.sum(axis=0), products, np.zeros(m))
        anchor = preferences * (logarithms - imbalance)
        descents = products @ anchor
        weighted = preferences * (losses / losses.max())
        return _solve(descents, products, _bounds(descents, weighted))

    def _preferences(self, m: int) -> Floats:
        preferences = row_weights(self.preference, m)
        if not (preferences > 0.0).all():
            raise ParameterError("preference", "positive", preferences.tolist())
        return preferences


def _bounds(descents: Floats, weighted: Floats) -> Floats:
    """How little each loss may fall at least: not at all for the largest."""
    if not (descents > 0.0).any():
        return np.zeros_like(descents)
    bounds = np.where(descents > 0.0, -np.inf, descents)
    bounds[weighted >= weighted.max()] = 0.0
    return bounds


def _solve(objective: Floats, products: Floats, bounds: Floats) -> Floats:
    # Conditions and objective at scale one, so that short rows count as much as long ones.
    sizes = np.abs(products).max(axis=1)
    kept = np.flatnonzero((sizes > 0.0) & np.isfinite(bounds))
    size = float(np.abs(objective).max())
    return maximize_on_simplex(
        objective / size if size > 0.0 else objective,
        products[kept] / sizes[kept, None],
        bounds[kept] / sizes[kept],
    )
