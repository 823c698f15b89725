"""Linear programs over the simplex, of a size where a dense tableau is the simplest thing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jdcore.errors import UnsolvedWarning, warn

Floats = NDArray[np.float64]

_TOLERANCE = 1e-11
_UNSOLVED = 1e-8


def maximize_on_simplex(objective: Floats, rows: Floats, bounds: Floats) -> Floats:
    """
    The weights ``w >= 0`` of sum 1 that maximise ``objective · w`` subject to ``rows w >= bounds``.

    A vertex is found by the simplex method, with the rule of Bland, which cannot cycle. Conditions
    that no weights satisfy are satisfied as far as possible, with an
    :class:`~jdcore.errors.UnsolvedWarning`.

    :param objective: Array [m].
    :param rows: Array [k, m], of entries of order one.
    :param bounds: Array [k], of order one.
    """
    k, m = rows.shape
    # Columns: weights, surplus of each condition, artificial variables, right-hand side.
    table = np.zeros((k + 1, m + k + k + 2))
    table[:k, :m], table[:k, m : m + k], table[:k, -1] = rows, -np.eye(k), bounds
    table[k, :m], table[k, -1] = 1.0, 1.0
    # The simplex method starts from right-hand sides that are not negative.
    table[table[:, -1] < 0.0] *= -1.0
    table[:, m + k : -1] = np.eye(k + 1)
    basis = np.arange(m + k, m + k + k + 1)
    costs = np.zeros(table.shape[1] - 1)
    # First of all, as little as possible of the artificial variables: none, if the conditions can
    # be satisfied.
    costs[m + k :] = 1.0
    _minimize(table, basis, costs, m + k + k + 1)
    infeasibility = float(table[basis >= m + k, -1].sum())
    if infeasibility > _UNSOLVED:
        warn(UnsolvedWarning("linear_program", infeasibility))
    costs[:m], costs[m:] = -objective, 0.0
    _minimize(table, basis, costs, m + k)
    weights = np.zeros(table.shape[1] - 1)
    weights[basis] = np.maximum(table[:, -1], 0.0)
    solution: Floats = weights[:m] / weights[:m].sum()
    return solution


def _minimize(table: Floats, basis: NDArray[np.intp], costs: Floats, columns: int) -> None:
    """Pivot until no cost can be reduced by one of the first columns; in place."""
    for _ in range(50 * len(costs)):
        reduced = costs[:columns] - costs[basis] @ table[:, :columns]
        entering = np.flatnonzero(reduced < -_TOLERANCE * max(1.0, float(np.abs(costs).max())))
        if not entering.size:
            return
        # The first one of all, not the best: this is what keeps the rule of Bland from cycling.
        column = int(entering[0])
        pivots = table[:, column]
        candidates = np.flatnonzero(pivots > _TOLERANCE)
        if not candidates.size:
            return
        ratios = table[candidates, -1] / pivots[candidates]
        ties = candidates[ratios <= ratios.min() + _TOLERANCE]
        _pivot(table, basis, int(ties[np.argmin(basis[ties])]), column)


def _pivot(table: Floats, basis: NDArray[np.intp], row: int, column: int) -> None:
    table[row] /= table[row, column]
    others = np.arange(len(table)) != row
    table[others] -= np.multiply.outer(table[others, column], table[row])
    basis[row] = column
