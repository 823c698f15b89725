from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from jdcore.aggregation import report_residual
from jdplugins.standard._solvers._gains import Gains
from jdplugins.standard._solvers._nash_of_few import bargain_few

_FEW = 4
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
        if 0 < len(gramian) <= _FEW:
            few = bargain_few(gramian.tolist())
            if few is not None:
                found = np.array(few)
                report_residual(_residual, gramian, found)
                return found
        return _GAINS.solve(gramian, np.ones(len(gramian)), level)


def _residual(gramian: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """By how much the gains of the rows differ from the ones that the equation asks for."""
    return float(np.abs(weights * (gramian @ weights) - 1.0).max())
