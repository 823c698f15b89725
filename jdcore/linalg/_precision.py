"""
How well the rows of a Jacobian are known, and what that means for its Gramian.

Rows that were rounded to relative u are J + E, and ``‖(J + E)ᵀ v‖²`` has the mean
``vᵀ (G + σ² D²) v``, where D holds the row norms and σ is of the order of u. Combinations of rows
that are shorter than that are rounding. A method that solved for them would give weights without
bound, which change with the next rounding: near Pareto stationarity, where training ends, they do.
Hence ``G + δ D²`` is what optimisation-based methods solve for, exactly. Directions with singular
values well above the root of δ do not notice.

The Gramian may be rounded itself: its products were made in float32, or it was stored in float32.
That is worse. Such a G is no Gramian of any rows, and its cosines are those of the rows but for
independent errors of about u, which together are as large as ``√m u``: δ is above that then, or
combinations of rows may even have a negative squared length.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore.linalg._blas import product

# Multiples of u whose squares are δ. Float32 can afford a distance from its rounding: 4e-12 is as
# small for what the rows say as it is large for what they do not. Half precision cannot: updates
# conflict with some rows by up to half of the root of δ, and more than 1e-3 of the mean row is not
# to be. Half of u is still above the noise of combinations: rounding moves a row by 0.43 u of its
# length.
_MARGINS = {torch.float32: 32.0, torch.float64: 0.0}
_HALF = 0.5
_EPS = 2.0**-52

_SHORT = 32  # rows up to which a call takes longer than products of all of them
# Relative error of the update that float32 factors may cause: half of a unit in the last place of
# each, times what is lost where the weighted rows cancel.
_VISIBLE = 2e-5
_ROUNDING = 2.0**-24


@cache
def proximal_level(m: int, precision: torch.dtype, products: torch.dtype = torch.float64) -> float:
    """
    The δ above for m rows that were rounded to a dtype.

    It is at least what rounding an m x m Gramian in float64 leaves: m * 2**-52.

    :param products: The dtype that the entries of the Gramian were made in, or rounded to.
    """
    margin = _MARGINS.get(precision, _HALF) * 0.5 * torch.finfo(precision).eps
    if products == torch.float64:
        return max(margin * margin, m * _EPS)
    # The errors of the cosines, and those of the two squared lengths that they are divided by.
    noise = 0.5 * torch.finfo(products).eps * (math.sqrt(m) + 2.0)
    return max(margin * margin, noise)


def add_proximal(gramian: NDArray[np.float64], level: float, /) -> NDArray[np.float64]:
    """
    ``G + δ D²``, as a new array.

    :param gramian: Gramian [m, m].
    :param level: δ, as :func:`proximal_level` gives it.
    """
    m = len(gramian)
    if m <= _SHORT:
        return gramian * _factors(m, level)  # one call of numpy in place of four
    definite: NDArray[np.float64] = gramian.copy()
    definite.reshape(-1)[:: m + 1] *= 1.0 + level
    return definite


@lru_cache(maxsize=64)
def _factors(m: int, level: float) -> NDArray[np.float64]:
    factors = np.ones((m, m))
    np.fill_diagonal(factors, 1.0 + level)
    return factors


@np.errstate(over="ignore", invalid="ignore")
def rounding_shows(weights: Tensor, gramian: Tensor, /) -> bool:
    """
    Whether the update needs factors of float64, because the weighted rows cancel.

    Rounding the weights to float32 changes the update by 6e-8 of the lengths of the weighted rows;
    that shows where the update is 300 times shorter than those together.

    :param weights: Weights [m] of any dtype.
    :param gramian: float64 Gramian [m, m] of the rows, or of a multiple of them.
    """
    if gramian.is_cpu:
        matrix, vector = gramian.numpy(), weights.double().cpu().numpy()
        squared = float(vector.dot(product(matrix, vector)))
        total = float(np.abs(vector).dot(np.sqrt(matrix.diagonal())))
    else:
        wide = weights.to(gramian)
        # Both at once: each number asked of an accelerator makes the host wait for it.
        squares = torch.stack([wide @ (gramian @ wide), wide.abs() @ gramian.diagonal().sqrt()])
        squared, total = squares.tolist()
    return bool(total * _ROUNDING > _VISIBLE * math.sqrt(max(squared, 0.0)))
