"""Gramians and what every Gramian method does with them, in float64."""

from jdcore.linalg._blas import (
    cholesky,
    eigh,
    factorize,
    one_thread,
    product,
    solve,
    solve_definite,
    substitute,
)
from jdcore.linalg._combine import combine, factors
from jdcore.linalg._complementarity import lcp_residual, refine_lcp
from jdcore.linalg._conflicts import alignment_score, conflicting_share, cosines
from jdcore.linalg._distances import lowest, squared_distances
from jdcore.linalg._equilibrate import equilibrate
from jdcore.linalg._generalized import flatten_gramian, objectives_shape, unflatten_gramian
from jdcore.linalg._gramian import cross_gramian, gramian
from jdcore.linalg._pivoting import EPS, exchange_few, misplaced, natural_residual, pivot
from jdcore.linalg._precision import add_proximal, proximal_level, rounding_shows

__all__ = [
    "EPS",
    "add_proximal",
    "alignment_score",
    "cholesky",
    "combine",
    "conflicting_share",
    "cosines",
    "cross_gramian",
    "eigh",
    "equilibrate",
    "exchange_few",
    "factorize",
    "factors",
    "flatten_gramian",
    "gramian",
    "lcp_residual",
    "lowest",
    "misplaced",
    "natural_residual",
    "objectives_shape",
    "one_thread",
    "pivot",
    "product",
    "proximal_level",
    "refine_lcp",
    "rounding_shows",
    "solve",
    "solve_definite",
    "squared_distances",
    "substitute",
    "unflatten_gramian",
]
