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
from numpy.typing import NDArray

from jdcore.linalg import equilibrate, exchange_few, lcp_residual, product, solve_definite
from jdplugins.standard._solvers._alone import EXACT, LARGE, solve_one
from jdplugins.standard._solvers._lcp import ROUGH, Floats, one_entry
from jdplugins.standard._solvers._parametric import follow
from jdplugins.standard._solvers._semidefinite import is_plausible
from jdplugins.standard._solvers._tiny import HANDFUL, HANDFUL_OF_ONE, Rows, roots_of, solve_few

_OPPOSED, _OPPOSED_TO_ONE = 6, 10  # rows from which on an inverse pays; for one vector
_INVERTED = 96  # rows up to which numpy inverts by one thread
_SOME = 4  # rows that have positive products with one projection of rows that nearly all conflict
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
    if k == m >= _OPPOSED or (k == 1 and m >= _OPPOSED_TO_ONE):
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
    Projections of rows that nearly all conflict: each is orthogonal to nearly all of them.

    :param references: One vector, or multiples of the unit vectors, in their order.
    :returns: None where that is not so.
    """
    m = len(gramian)
    # Of random rows, half of the pairs conflict; these are three standard deviations more.
    if np.count_nonzero(gramian < 0.0) < (m - 1) * (0.5 * m + 2.0):
        return None
    norms = np.sqrt(gramian.diagonal())
    one, shares = len(references) == 1, references.diagonal()
    if not one and (np.count_nonzero(references) != m or not shares.min() > 0.0):
        return None
    try:
        inverse = _inverse(gramian)
    except np.linalg.LinAlgError:
        return None
    if one:
        scales = np.abs(references * norms).max(1)
        found, own = _beside_some(inverse, references[0])
    else:
        scales, own = shares * norms, np.arange(0, m * m, m + 1)
        found = inverse * (shares / inverse.diagonal())[:, None]
        found.flat[own] = shares
    # What is left of the products of rows as long as in the problem that others solve. Only those
    # with the own rows may be positive; of rows whose products are rounded to an indefinite matrix,
    # they may be negative.
    products = product(found / scales[:, None], gramian) / norms
    positive = products.flat[own].min() >= 0.0
    products.flat[own] = 0.0
    exact = positive and np.abs(products).max() <= EXACT
    return found if exact and (found >= references).all() else None


def _inverse(gramian: Floats) -> Floats:
    m = len(gramian)
    # Numpy's takes half of the time, but as many threads as there are cores of what is large.
    if m > _INVERTED:
        return solve_definite(gramian, np.eye(m))
    return np.asarray(np.linalg.inv(gramian), dtype=np.float64)


def _beside_some(inverse: Floats, reference: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """
    The projection of one vector if only a few rows have positive products with it.

    The most likely ones come first: those with which it would be the longest, were they alone.

    :returns: It [1, m], and these rows.
    """
    rows = np.argsort(-reference * np.abs(reference) / inverse.diagonal())
    for count in range(1, _SOME + 1):
        few = rows[:count]
        products = np.linalg.solve(inverse[few[:, None], few], reference[few])
        found: Floats = products.dot(inverse[few])
        found[few] = reference[few]
        if (found >= reference).all():
            break
    return found[None], few


def _solved(C: Floats, Q: Floats) -> Floats | None:
    """Solutions of the LCPs of all rows of Q; None where there may be none."""
    if _are_independent(C):
        near = np.maximum(-Q, 0.0)  # one projected gradient step, nearer the truth than ``q < 0``
        Z = exchange_few(C, Q, -Q, product(near, C) + Q < near)
        left = ~(lcp_residual(C, Q, Z) <= EXACT)
    else:
        Z, residuals, enough = one_entry(C, Q)
        left = ~(residuals <= enough)
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
