"""What the methods that choose or clip rows share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jdcore.errors import ParameterError


def require_rows(m: int, least: int, why: str, parameter: str = "gramian") -> None:
    """
    Refuse too few rows.

    :param why: The formula of the least number, for the message.
    :param parameter: What has the rows, for the message.
    :raises ParameterError: If m is below ``least``.
    """
    if m < least:
        raise ParameterError(parameter, f"of at least {least} rows ({why})", f"{m} rows")


def require_majority(m: int, n_byzantine: int, parameter: str = "gramian") -> None:
    """
    Refuse rows of which the honest ones may be no majority: nothing can tell them apart then.

    :raises ParameterError: If there are fewer than ``2 n_byzantine + 1`` rows.
    """
    require_rows(m, 2 * n_byzantine + 1, "2 n_byzantine + 1", parameter)


def average_of(rows: NDArray[np.int64], m: int) -> NDArray[np.float64]:
    """Weights [m] of the mean of some rows, given by their indices."""
    weights = np.zeros(m)
    weights[rows] = 1.0 / len(rows)
    return weights


def clipping_factors(lengths: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Factors ``min(1, limit / length)``, by which rows become no longer than a limit."""
    factors = np.ones_like(lengths)
    # Only these are divided: rows of length zero would give NaN where the limit is zero.
    longer = lengths > limit
    factors[longer] = limit / lengths[longer]
    return factors
