from __future__ import annotations

import numpy as np
from attrs import field, frozen

from jdcore.linalg import product
from jdcore.validators import integer, real
from jdplugins.standard._solvers._lcp import Floats


@frozen
class FrankWolfeSolver:
    """
    The Frank-Wolfe procedure for the min-norm point, as MGDA was published for deep learning.

    Algorithm 2 of `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/pdf/1810.04650>`_: from equal weights, move towards the row with the smallest
    inner product by an exact line search, until a step is shorter than ``epsilon``. It converges
    sublinearly and stops early, far from the min-norm point where the rows conflict or differ in
    scale: choose it to reproduce published results, ``"native"`` for everything else.

    :param epsilon: Step length at which it stops.
    :param max_iters: Largest number of steps.
    """

    epsilon: float = field(default=0.001, kw_only=True, validator=real(0.0))
    max_iters: int = field(default=100, kw_only=True, validator=integer(1))

    def __call__(self, gramian: Floats, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :returns: Weights w [m], >= 0, of sum one.
        """
        m = len(gramian)
        weights = np.full(m, 1.0 / m)
        products = product(gramian, weights)
        for _ in range(self.max_iters):
            towards = int(products.argmin())
            step = _line_search(
                float(weights @ products),
                float(products[towards]),
                float(gramian[towards, towards]),
            )
            weights *= 1.0 - step
            weights[towards] += step
            # Brought up to date by the row that was moved towards: no product with the whole
            # Gramian.
            products *= 1.0 - step
            products += step * gramian[towards]
            if step < self.epsilon:
                break
        return weights


def _line_search(here: float, across: float, there: float) -> float:
    """Minimiser in [0, 1] of ``(1 - t)² here + 2 t (1 - t) across + t² there``."""
    if there <= across:
        return 1.0
    if here <= across:
        return 0.0
    return (here - across) / ((here - across) + (there - across))
