from __future__ import annotations

import numpy as np

from jdcore.linalg import eigh, product
from jdplugins.standard._solvers._accuracy import EPS, Floats


def nearest_semidefinite(C: Floats) -> Floats:
    """
    Remove the noise of a matrix of cosines that is not positive semi-definite.

    A Gramian that was computed or stored in a narrower dtype than float64 may have negative
    eigenvalues, and an LCP with such a matrix need not have a solution. Eigenvalues up to the size
    of the most negative one are noise of the same origin, so they are set to zero with it.

    :param C: Symmetric matrix [m, m] with unit diagonal (zero for zero rows).
    :returns: The matrix itself if it is positive semi-definite to float64 precision; else the
        nearest one of that rank, scaled back to the diagonal of C.
    """
    values, vectors = eigh(C)
    if values[0] >= -32.0 * len(C) * EPS:
        return C
    kept = values > -values[0]
    roots = vectors[:, kept] * np.sqrt(values[kept])
    norms = np.sqrt(np.einsum("ij,ij->i", roots, roots))
    roots *= np.divide(C.diagonal(), norms, out=np.zeros_like(norms), where=norms > 0.0)[:, None]
    definite: Floats = product(roots, roots.T)
    np.fill_diagonal(definite, C.diagonal())
    return definite
