"""How much the objectives disagree, read off the Gramian of their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jdcore.validators import check_gramian


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
    check_gramian(gramian)
    wide = gramian.detach().double()
    norms = wide.diagonal().sqrt()  # one root at a time: products of squares leave the range
    norms = torch.where((norms > 0) & norms.isfinite(), norms, math.nan)
    result = (wide / norms[:, None] / norms).clamp(-1.0, 1.0)
    result.diagonal().copy_(norms / norms)
    return result


def conflicting_share(gramian: Tensor, /, *, rounding: float = 1e-6) -> float:
    """
    Share of the pairs of objectives whose gradients conflict, that is, have a negative cosine.

    :param gramian: Gramian of the Jacobian, real floating Tensor [m, m].
    :param rounding: Cosines above ``-rounding`` count as zero: gradients that are orthogonal come
        out of float32 arithmetic near -1e-7.
    :returns: A number in [0, 1] over the pairs of gradients that are finite and not zero; NaN if
        there is no such pair.
    :raises ParameterError: If the Gramian is no real floating square matrix.

    >>> import torch
    >>> from jdcore.linalg import conflicting_share
    >>> conflicting_share(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    1.0
    """
    angles = cosines(gramian)
    m = len(angles)
    pairs = angles[tuple(torch.triu_indices(m, m, 1, device=angles.device))]
    known = pairs[~pairs.isnan()]
    return float((known < -rounding).double().mean()) if len(known) else math.nan


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
    angles = cosines(gramian)
    known = ~angles.diagonal().isnan()
    count = int(known.sum())
    if count == 0:
        return math.nan
    return 2.0 * float(angles[known][:, known].sum()) / count**2 - 1.0
