"""How much the objectives disagree, read off the Gramian of their gradients."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore.validators import check_gramian

ROUNDING = 1e-6
"""Cosines above the negative of this count as zero: vectors that are orthogonal by construction
come out of float32 arithmetic near -1e-7."""


def cosines(gramian: Tensor, /) -> Tensor:
    """
    Cosines of the angles between the rows of a Jacobian.

    :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
    :returns: float64 Tensor [m, m] of entries in [-1, 1] on the same device, 1 on the diagonal; NaN
        in the row and the column of a gradient that is zero or not finite.
    :raises ParameterError: If the Gramian is no real floating square matrix.

    >>> import torch
    >>> from jdcore.linalg import cosines
    >>> cosines(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    tensor([[ 1.0000, -0.5000],
            [-0.5000,  1.0000]], dtype=torch.float64)
    """
    return torch.from_numpy(angles_of(_array(gramian))).to(gramian.device)


def conflicting_share(gramian: Tensor, /, *, rounding: float = ROUNDING) -> float:
    """
    Share of the pairs of objectives whose gradients conflict, that is, have a negative cosine.

    :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
    :param rounding: Cosines above ``-rounding`` count as zero: gradients that are orthogonal by
        construction come out of float32 arithmetic near -1e-7.
    :returns: A number in [0, 1] over the pairs of gradients that are finite and not zero; NaN if
        there is no such pair.
    :raises ParameterError: If the Gramian is no real floating square matrix.

    >>> import torch
    >>> from jdcore.linalg import conflicting_share
    >>> conflicting_share(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    1.0
    """
    return share_of(angles_of(_array(gramian)), rounding)


def alignment_score(gramian: Tensor, /) -> float:
    """
    Alignment score of the gradients: ``2 ‖mean of gᵢ / ‖gᵢ‖‖² - 1``.

    It is 1 where all gradients point the same way, the cosine for two of them, 0 if the mean of
    the unit vectors has length 1/√2, and -1 where they cancel (`Gradient Alignment in
    Physics-informed Neural Networks <https://arxiv.org/pdf/2502.00604>`_, 2025).

    :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
    :returns: The score over the gradients that are finite and not zero; NaN if there is none.
    :raises ParameterError: If the Gramian is no real floating square matrix.

    >>> import torch
    >>> from jdcore.linalg import alignment_score
    >>> alignment_score(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    -0.5
    """
    return score_of(angles_of(_array(gramian)))


def _array(gramian: Tensor) -> NDArray[np.float64]:
    check_gramian(gramian)
    array: NDArray[np.float64] = gramian.detach().double().cpu().numpy()
    return array


def angles_of(gramian: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`cosines` of a float64 array."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.sqrt(gramian.diagonal())
        norms = np.where((norms > 0.0) & (norms < math.inf), norms, math.nan)
        # One root at a time, as products of squares leave the range.
        angles = gramian / norms[:, None]
        angles /= norms
    np.maximum(angles, -1.0, out=angles)
    np.minimum(angles, 1.0, out=angles)
    np.fill_diagonal(angles, norms / norms)  # 1, or NaN of a norm that is
    return angles


def share_of(angles: NDArray[np.float64], rounding: float = ROUNDING) -> float:
    """:func:`conflicting_share`, given the cosines."""
    known = _known(angles)
    pairs = known * (known - 1)  # each of them twice, as the matrix holds them
    return float(np.count_nonzero(angles < -rounding)) / pairs if pairs else math.nan


def score_of(angles: NDArray[np.float64]) -> float:
    """:func:`alignment_score`, given the cosines."""
    known = _known(angles)
    if not known:
        return math.nan
    total = angles.sum() if known == len(angles) else np.nansum(angles)
    return 2.0 * float(total) / known**2 - 1.0


def _known(angles: NDArray[np.float64]) -> int:
    diagonal = angles.diagonal()
    return int(np.count_nonzero(diagonal == diagonal))  # the others are NaN
