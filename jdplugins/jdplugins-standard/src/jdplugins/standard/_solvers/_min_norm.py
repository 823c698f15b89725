from __future__ import annotations

import math

import numpy as np
from attrs import frozen

from jdcore.aggregation import report_residual
from jdcore.linalg import equilibrate, lcp_residual, product
from jdplugins.standard._solvers._alone import solve_one
from jdplugins.standard._solvers._guess import descend
from jdplugins.standard._solvers._lcp import Floats
from jdplugins.standard._solvers._tiny import HANDFUL, Rows, roots_of, solve_few
from jdplugins.standard._solvers._unsolved import warn_if_unsolved


@frozen
class NativeMinNormSolver:
    """
    Exact min-norm point of the convex hull; the native solver of ``problem="min_norm"``.

    With C the cosines, D the row norms d and ``a = min(d) / d``, the weights are ``a z / sum(a z)``
    for the z >= 0 that minimises ``zᵀ C z + (1 - aᵀ z)²``. That is an LCP whose entries are of
    order one whatever the scales of the rows.

    A solution comes with an :class:`~jdcore.errors.UnsolvedWarning` where the natural residual of
    this LCP exceeds 1e-10 of ``1 + max z``.
    """

    def __call__(self, gramian: Floats, /) -> Floats:
        """
        :param gramian: Finite Gramian [m, m].
        :returns: Weights w [m], >= 0, of sum one; equal on the zero rows if there are any.
        """
        if len(gramian) <= HANDFUL:
            rows = gramian.tolist()
            few = _shortest_of_two(rows) if len(rows) == 2 else _shortest_of_few(rows)
            if few is not None:
                found = np.array(few)
                report_residual(_residual, gramian, found)
                return found
        zero = np.diagonal(gramian) <= 0.0
        if zero.any():
            shared: Floats = zero / np.count_nonzero(zero)
            return shared
        cosines, norms, inverses = equilibrate(gramian)
        ratios = norms.min() * inverses
        z = shortest(cosines, ratios)
        weights: Floats = z * ratios
        weights /= weights.sum()
        return weights


def shortest(cosines: Floats, ratios: Floats) -> Floats:
    """The z of the class docstring, for rows that are not zero."""
    # The solution for C alone is a multiple of that for C + a aᵀ, whose one large eigenvalue would
    # make descent slow. If rows cancel there is none, but the start may be wrong.
    passive = descend(cosines, -ratios, np.zeros_like(ratios)) > 0.0
    matrix = np.multiply.outer(ratios, ratios)
    matrix += cosines
    z, residual = solve_one(matrix, -ratios, passive)
    warn_if_unsolved("min_norm", residual)
    return z


def _residual(gramian: Floats, weights: Floats) -> float:
    """That of the LCP of the class docstring, for the multiple of the weights that solves best."""
    cosines, norms, inverses = equilibrate(gramian)
    if not norms.min() > 0.0:  # the answer is a zero row
        return 0.0
    ratios = norms.min() * inverses
    z = weights * norms / norms.min()
    z /= 1.0 + float(z @ product(cosines, z))
    return float(lcp_residual(cosines + np.multiply.outer(ratios, ratios), -ratios, z))


def _shortest_of_two(gramian: Rows) -> list[float]:
    (g00, g01), (_, g11) = gramian
    w0, w1 = max(g11 - g01, 0.0), max(g00 - g01, 0.0)
    total = w0 + w1
    if total == 0.0:  # the rows are equal
        return [0.5, 0.5]
    return [w0 / total, w1 / total]


def _shortest_of_few(G: Rows) -> list[float] | None:
    """The same in plain floats, for ``w``: that of ``G + s² 1 1ᵀ``, with s the shortest length."""
    least = min([row[i] for i, row in enumerate(G)])
    if least <= 0.0:
        return None
    A = [[x + least for x in row] for row in G]
    w = solve_few(A, [-least] * len(A), roots_of(A), math.sqrt(least))
    if w is None:
        return None
    total = sum(w.values())
    return [w.get(i, 0.0) / total for i in range(len(A))]
