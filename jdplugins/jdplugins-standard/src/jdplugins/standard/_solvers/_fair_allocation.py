from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdplugins.standard._solvers._gains import Gains


@frozen
class NativeFairAllocationSolver:
    """
    Exact alpha-fair allocation; the native solver of ``problem="fair_allocation"``.

    The Newton iteration of Nash bargaining, which is the case ``alpha = 1``, for any alpha.
    """

    def __call__(
        self, gramian: NDArray[np.float64], alpha: float, level: float = 0.0, /
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian [m, m].
        :param alpha: Degree of fairness, > 0.
        :param level: Squared length of a combination of unit rows that is rounding.
        :returns: Weights w [m], zero for zero rows.
        """
        return Gains(1.0 / alpha, "fair_allocation").solve(gramian, np.zeros(len(gramian)), level)
