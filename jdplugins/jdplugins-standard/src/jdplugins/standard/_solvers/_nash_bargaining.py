from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdplugins.standard._solvers._gains import Gains

_GAINS = Gains(1.0, "nash_bargaining")


@frozen
class NativeNashBargainingSolver:
    """
    Exact Nash bargaining; the native solver of ``problem="nash_bargaining"``.

    With D the diagonal matrix of the row norms, ``C = D⁻¹ G D⁻¹`` and ``b = D α``, the equation
    ``C b = 1/b`` says that b minimises the self-concordant ``½ bᵀ C b - Σ log b``. Damped Newton
    steps relative to b solve it, for singular C too.

    Where there is no solution, 0 lies in the convex hull of some rows, to about 1e-6 of their norms
    or to the precision at which they are known. These rows leave the game, see
    :class:`~jdcore.protocols.NashBargainingSolver`.
    """

    def __call__(
        self,
        gramian: NDArray[np.float64],
        start: NDArray[np.float64] | None = None,
        level: float = 0.0,
        /,
    ) -> NDArray[np.float64]:
        """
        :param gramian: Finite Gramian [m, m].
        :param start: Not used: the answer is exact from any start.
        :param level: Squared length of a combination of unit rows that is rounding.
        :returns: Weights α [m], zero for zero rows.
        """
        return _GAINS.solve(gramian, np.zeros(len(gramian)), level)
