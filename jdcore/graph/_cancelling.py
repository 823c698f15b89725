"""Whether losses are so near Pareto stationarity, or so small, that float32 is too coarse."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jdcore.graph.shares._product import products_in_float64

# Products of float32 are wrong by about 1e-7 of the lengths of two rows. Where no combination of
# rows of length one is shorter than the root of this, that is 1e-4 of the Gramian in any direction.
_SMALLEST = 1e-3

# Losses up to which the Gramian is multiplied in float64 where their rows nearly cancel: there its
# smallest eigenvalues matter, which float32 products drown in their rounding. For more losses that
# would cost more than the backward pass.
_FEW = 64

# Float32 ends at 1e-38. Where the square of the longest row is above this, seven digits are left of
# that of a row a hundred million times shorter.
_LEAST = 1e-15


def multiplied(
    rows: int,
    precision: torch.dtype,
    added_up: Callable[[], tuple[Tensor, bool]],
    agreed: Callable[[bool], bool] = bool,
) -> tuple[Tensor, bool]:
    """
    Make a Gramian, and once more with products in float64 if those of float32 are too coarse.

    They are so if rows nearly cancel, of which few losses show the smallest eigenvalues, or if what
    was summed up to a row does, or if squares of rows leave the range of float32.

    :param rows: The number of losses m.
    :param precision: What the rows were rounded to.
    :param added_up: Makes it, float64 [m, m], and says whether what was summed has cancelled.
    :param agreed: Tells from what is found here what is done: where several processes make it, all
        of them make it again if one finds that its rows cancel.
    :returns: It, and whether it is known that no combination of its rows, scaled to one length,
        nearly vanishes. Then :func:`~jdcore.linalg.rounding_shows` of no weights: the update is at
        least ``sqrt(1e-3 / m)`` times as long as the weighted rows together, where m is at most 64,
        which is above the three thousandths from which on it shows.
    """
    gramian, cancelled = added_up()
    rounded = precision != torch.float64
    coarse = rounded and (cancelled or _is_coarse(gramian))
    if agreed(coarse):
        with products_in_float64():
            gramian, _ = added_up()
    return gramian, rounded and not coarse and rows <= _FEW


def products_of(rows: int, precision: torch.dtype) -> torch.dtype:
    """
    The dtype that products of rows are as exact as, where it matters.

    :param precision: What the rows were rounded to.
    """
    exact = precision == torch.float64 or rows <= _FEW
    return torch.float64 if exact else torch.float32


def _is_coarse(gramian: Tensor) -> bool:
    if gramian.shape[0] > _FEW:  # `len` is a function of Python
        return _leaves_range(gramian)
    shown = gramian.cpu()  # once, as each question waits for an accelerator
    return _leaves_range(shown) or rows_cancel(shown)


def _leaves_range(gramian: Tensor) -> bool:
    """Whether no row is long enough, or one too long, for its square in float32."""
    squares = gramian.diagonal().tolist()  # one call, and no kernel
    # The sum is infinite or NaN if one of them is.
    return not (max(squares, default=1.0) >= _LEAST and sum(squares) < math.inf)


def rows_cancel(gramian: Tensor) -> bool:
    """
    Whether some combination of the rows, scaled to one length, nearly vanishes.

    :param gramian: Shape [m, m], float64. It is read, which waits for an accelerator.
    """
    # That G - s D is definite, with D the diagonal of G, says that all eigenvalues of the cosines
    # are above s. It is so if the Cholesky factorization goes through, which costs a fraction of
    # the eigenvalues, and by torch rather than numpy, whose code a training step has driven from
    # the caches of the processor.
    shifted = gramian.to("cpu", copy=True)
    squares = shifted.diagonal().mul_(1.0 - _SMALLEST)
    if not torch.linalg.cholesky_ex(shifted)[1].item():
        return False
    if not bool(gramian.isfinite().all()):
        return False  # whatever the precision
    squares[~(squares > 0.0)] = 1.0  # a row that is zero cancels nothing
    return bool(torch.linalg.cholesky_ex(shifted)[1].item())
