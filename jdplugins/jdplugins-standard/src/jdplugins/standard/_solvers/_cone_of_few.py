"""
The projection onto the dual cone of a handful of rows, in plain Python floats.

Its time is that of calls and loops, so this module spares them: products by ``map`` rather than in
comprehensions, closed forms for two and three rows, and only entries of z that are not zero.
"""

from __future__ import annotations

from operator import mul

from jdplugins.standard._solvers._tiny import equilibrate_tiny, solve_pair, solve_tiny

# Squared norms whose products stay in the range of float64.
_SAFE = (1e-140, 1e140)

Rows = list[list[float]]


def project_few(G: Rows, references: Rows) -> Rows | None:
    """
    Project ``Jᵀ u`` for every reference u.

    :param G: Gramian, as m lists.
    :param references: The vectors u, as lists of m, which become the result.
    :returns: The vectors v >= u; None for zero or nearly dependent rows.
    """
    m = len(G)
    if m == 2:
        return _project_two(G, references)
    if m == 3 and len(references) == 3:
        return _project_three(G, references)
    if len(references) == 1:  # in the cone already, as the mean of the rows often is
        [u] = references
        if min([sum(map(mul, row, u)) for row in G]) >= 0.0:
            return references
    equilibrated = equilibrate_tiny(G)
    if equilibrated is None:
        return None
    C, norms, inverses = equilibrated
    for u in references:
        scale = max(u)
        if scale > 0.0 and u.count(0.0) == m - 1:  # UPGrad: u is a multiple of a unit vector
            i = u.index(scale)
            scale *= norms[i]
            q = C[i]
        else:
            scaled = list(map(mul, u, norms))
            scale = max(max(scaled), -min(scaled)) or 1.0
            unit = [x / scale for x in scaled]
            q = [sum(map(mul, row, unit)) for row in C]
        if min(q) < 0.0:
            z = solve_tiny(C, q)
            if z is None:
                return None
            for j, entry in z.items():
                u[j] += scale * entry * inverses[j]
    return references


def _project_two(G: Rows, references: Rows) -> Rows | None:
    """Closed form: only one of two rows can take the other's conflict away, or v is zero."""
    (g00, g01), (_, g11) = G
    if g00 <= 0.0 or g11 <= 0.0:
        return None
    r0, r1 = -g01 / g00, -g01 / g11
    for u in references:
        u0, u1 = u
        if u0 <= 0.0 and u1 <= 0.0:
            u[0] = u[1] = 0.0
        if u1 > 0.0:
            u[0] = max(u0, r0 * u1)
        if u0 > 0.0:
            u[1] = max(u1, r1 * u0)
    return references


def _project_three(G: Rows, references: Rows) -> Rows | None:
    """
    Closed form for positive multiples of unit vectors, which is what UPGrad asks for.

    A row never conflicts with its own projection, so only two entries of z can be positive.
    """
    squares = G[0][0], G[1][1], G[2][2]
    if min(squares) < _SAFE[0] or max(squares) > _SAFE[1]:
        return None
    for u in references:
        scale = max(u)
        if scale <= 0.0 or u.count(0.0) != 2:
            return None
        i = u.index(scale)
        j, k = i - 2, i - 1
        row, other = G[i], G[j]
        pair = solve_pair(other[j], G[k][k], other[k], row[j], row[k])
        if pair is None:
            return None
        u[j], u[k] = scale * pair[0], scale * pair[1]
    return references
