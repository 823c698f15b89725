"""
Projections onto the dual cone of few rows, or of one vector, which hardly call torch.

Their time is that of calls: a handful of rows is solved in plain floats, more in numpy, whose calls
take half as long as those of torch. What exchanges do not solve takes parametric pivots; what these
do not, as where the Gramian is indefinite, is left to others.
"""

from __future__ import annotations

from operator import mul

import numpy as np
import torch

from jdcore.linalg import equilibrate, exchange_few, lcp_residual, product, solve_definite
from jdplugins.standard._solvers._alone import EXACT, LARGE, solve_one
from jdplugins.standard._solvers._lcp import ROUGH, Floats, one_entry
from jdplugins.standard._solvers._parametric import follow
from jdplugins.standard._solvers._semidefinite import is_plausible
from jdplugins.standard._solvers._tiny import HANDFUL, HANDFUL_OF_ONE, Rows, roots_of, solve_few

_OPPOSED = 6  # rows from which on an inverse pays
_MANY = 32  # rows from which on a guess pays
_INDEPENDENT = 3e-3  # length of what each unit row has beside those before it


def project_few(gramian: Floats, references: Floats) -> Floats | None:
    """
    Project ``Jᵀ u`` for every reference u.

    :param gramian: Gramian [m, m].
    :param references: Vectors u [k, m].
    :returns: Vectors v >= u [k, m]; None where that takes more.
    """
    k, m = references.shape
    found: Floats
    if not references.size:
        return None
    if m > 2 and _are_inside(gramian, references):
        found = references.copy()
        return found
    if k == m >= _OPPOSED:
        opposed = _among_opposed(gramian, references)
        if opposed is not None:
            return opposed
    if m <= (HANDFUL_OF_ONE if k == 1 else HANDFUL):
        project = _project_two if m == 2 else _project_handful
        few = project(gramian.tolist(), references.tolist())
        if few is not None:
            found = np.array(few)
            return found
    if m > _MANY and k != 1:
        return None
    cosines, norms, inverses, scales, Q = lcps_of(gramian, references)
    if k == 1:
        z, residual = solve_one(cosines, Q[0])
        Z = z[None] if residual <= ROUGH else None
    else:
        cosines.flat[:: m + 1] = 1.0  # of zero rows, too, which are left alone then
        Z = _solved(cosines, Q)
    if Z is None:
        return None
    if Z.max() > LARGE:
        given = cosines, references * norms / scales, Q, Z
        if not is_plausible(*map(torch.from_numpy, given)):
            return None
    found = references + Z * inverses * scales
    return found


def lcps_of(gramian: Floats, references: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """
    The linear complementarity problems that projections are.

    :returns: The matrix C [m, m], the lengths of the rows [m] and their inverses, the scales of the
        references [k, 1], and the vectors q [k, m].
    """
    cosines, norms, inverses = equilibrate(gramian)
    scaled = references * norms
    scales = np.abs(scaled).max(axis=1, keepdims=True)
    scales[scales == 0.0] = 1.0
    scaled /= scales
    return cosines, norms, inverses, scales, product(scaled, cosines)


def _are_inside(gramian: Floats, references: Floats) -> bool:
    """Whether all is in the cone already, as the mean of the rows often is."""
    if len(references) == 1:  # without numpy's reductions, which take longer than the rest
        return bool(min(product(gramian, references[0]).tolist()) >= 0.0)
    if len(gramian) <= HANDFUL:  # told as they are projected
        return False
    return bool(gramian.min() >= 0.0 and references.min() >= 0.0)


@np.errstate(all="ignore")  # what leaves the range of floats is told at the end
def _among_opposed(gramian: Floats, references: Floats) -> Floats | None:
    """
    Projections of rows that nearly all conflict: each is orthogonal to all other rows.

    :param references: Multiples of the unit vectors, in their order.
    :returns: None where that is not so.
    """
    m, shares = len(gramian), references.diagonal()
    # Of random rows, half of the pairs conflict; these are three standard deviations more.
    if np.count_nonzero(gramian < 0.0) < (m - 1) * (0.5 * m + 2.0):
        return None
    if np.count_nonzero(references) != m or not shares.min() > 0.0:
        return None
    try:
        inverse = solve_definite(gramian, np.eye(m))
    except np.linalg.LinAlgError:
        return None
    found: Floats = inverse * (shares / inverse.diagonal())[:, None]
    found.flat[:: m + 1] = shares
    # What is left of the products of unit vectors, of which that with its own row may be positive.
    norms = np.sqrt(gramian.diagonal())
    products = product(found / (shares * norms)[:, None], gramian) / norms
    products.flat[:: m + 1] = 0.0
    # Of rows whose products are rounded to an indefinite matrix, the product with the own row may
    # be negative; then all others are.
    exact = inverse.diagonal().min() > 0.0 and np.abs(products).max() <= EXACT
    return found if exact and found.min() >= 0.0 else None


def _solved(C: Floats, Q: Floats) -> Floats | None:
    """Solutions of the LCPs of all rows of Q; None where there may be none."""
    if _are_independent(C):
        near = np.maximum(-Q, 0.0)  # one projected gradient step, nearer the truth than ``q < 0``
        Z = exchange_few(C, Q, -Q, product(near, C) + Q < near)
        left = ~(lcp_residual(C, Q, Z) <= EXACT)
    else:
        Z, residuals = one_entry(C, Q)
        left = ~(residuals <= EXACT)
    if left.any():
        Z[left], residuals = follow(C, Q[left])
        if not residuals.max() <= ROUGH:
            return None
    return Z


def _are_independent(C: Floats) -> bool:
    try:
        return bool(np.linalg.cholesky(C).diagonal().min() >= _INDEPENDENT)
    except np.linalg.LinAlgError:
        return False


def _project_handful(G: Rows, references: list[list[float]]) -> list[list[float]] | None:
    """:func:`project_few` of lists, which become the result."""
    roots: list[float] = []
    for u in references:
        scale = max(u)
        alone = scale > 0.0 and u.count(0.0) == len(G) - 1  # UPGrad: a multiple of a unit vector
        i = u.index(scale)
        q = [x * scale for x in G[i]] if alone else [sum(map(mul, row, u)) for row in G]
        if min(q) >= 0.0:
            continue
        roots = roots or roots_of(G)
        size = scale * roots[i] if alone else max(map(abs, map(mul, u, roots)))
        z = solve_few(G, q, roots, size)
        if z is None:
            return None
        for j, entry in z.items():
            u[j] += entry
    return references


def _project_two(G: Rows, references: list[list[float]]) -> list[list[float]] | None:
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
