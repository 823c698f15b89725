from __future__ import annotations

import torch
from torch import Tensor

from jdcore.linalg import EPS
from jdplugins.standard._solvers._alone import LARGE
from jdplugins.standard._solvers._lcp import objective


def nearest_semidefinite(C: Tensor) -> Tensor:
    """
    Remove the noise of a matrix of cosines that is not positive semi-definite.

    A Gramian that was computed or stored in a narrower dtype than float64 may have negative
    eigenvalues, and an LCP with such a matrix need not have a solution. Eigenvalues up to the size
    of the most negative one are noise of the same origin, so they are set to zero with it.

    :param C: Symmetric matrix [m, m] with unit diagonal (zero for zero rows).
    :returns: The matrix itself if it is positive semi-definite to float64 precision; else the
        nearest one of that rank, scaled back to the diagonal of C.
    """
    values, vectors = torch.linalg.eigh(C)
    if float(values[0]) >= -32.0 * len(C) * EPS:
        return C
    kept = values > -values[0]
    roots = vectors[:, kept] * values[kept].sqrt()
    norms = roots.norm(dim=1)
    roots *= torch.where(norms > 0.0, C.diagonal() / norms, 0.0)[:, None]
    definite: Tensor = roots @ roots.T
    definite.diagonal().copy_(C.diagonal())
    return definite


def is_plausible(C: Tensor, U: Tensor, Q: Tensor, Z: Tensor) -> bool:
    """Whether none is an answer of an indefinite matrix, of which a large z tells nothing."""
    sizes = Z.amax(1)
    large = sizes > LARGE
    if not large.any():
        return True
    # A solution is shorter than what is projected, and not by more than that is long.
    shortened = -2.0 * objective(C, Q[large], Z[large])
    rounding = (len(C) * EPS * sizes[large].square()).clamp_max_(1.0)
    squared = (Q * U).sum(1)[large]
    return bool(((shortened >= -rounding) & (shortened <= squared + rounding)).all())
