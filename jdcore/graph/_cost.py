"""
The cost model: which form of the Gramian of a share is cheapest.

Times are in nanoseconds on one core; only their order matters, so the two constants need to be
right to a factor of two at most, and hold for accelerators as well, whose speed and memory are both
faster by about the same factor. Shapes: K tasks, B samples, T positions per sample, N = B T; a
weight maps i inputs to o outputs. The three forms of a share with J = sum_t D_t X_tᵀ are

* ghost: Gram matrices of X and D over positions, [N, N] each, and never J;
* direct: the rows of J in pieces, and their products;
* rows: the rows of J from autograd itself (only without samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

_FLOPS = 90.0  # multiply-adds count as two
_BYTES = 8.0
_ENTRY = 4.0  # bytes
_CACHE = 2 << 20  # bytes
_CALL = 8000.0
GHOST_LIMIT = 8 << 20
"""Entries of an [N, N] matrix that are still worth having on a CPU."""


def _time(flops: float, entries: float) -> float:
    return flops / _FLOPS + entries * _ENTRY / _BYTES


def _half(K: int, N: int) -> float:
    """What is computed of a symmetric [N, N] matrix: with one task, pieces up to the diagonal."""
    pieces = max(1, min(8, N // 256)) if K == 1 else 1
    return (pieces + 1) / (2 * pieces)


def _contraction(K: int, B: int, T: int, o: int, A: float) -> float:
    """<D_r, A D_s> for all rows r, s, with A an [N, N] matrix."""
    N = B * T
    # Of one task: the products of its gradients, up to the diagonal, times A entry by entry.
    if K == 1:
        return _half(K, N) * _time(2 * N * N * o, 2 * A)
    # Of one sample, A is multiplied with the gradients of each task, and those with all others.
    if B == 1:
        return _time(2 * K * N * N * o + 2 * K * K * T * o, A + 2 * K * N * o)
    # Of several of both, each pair of tasks has an [N, N] product of its own.
    return _time(K * (K + 1) * N * N * o, K * (K + 1) * A)


def _outer_ghost(K: int, B: int, T: int, i: int, o: int) -> float:
    N = B * T
    return _half(K, N) * _time(2 * N * N * i, N * N) + _contraction(K, B, T, o, N * N)


def _direct(R: int, T: int, P: int) -> float:
    # Products of few long rows reach half the speed of large ones.
    return _time(2 * R * T * P + 4 * R * R * P, 2 * R * P)


@lru_cache(maxsize=1024)
def outer_ghost_beats_direct(K: int, B: int, T: int, i: int, o: int) -> bool:
    """For a batch of samples with T > 1 positions each."""
    return _outer_ghost(K, B, T, i, o) < _direct(K * B, T, i * o)


@lru_cache(maxsize=1024)
def outer_ghost_beats_rows(K: int, N: int, i: int, o: int) -> bool:
    """For one sample with N positions: K tasks over a whole batch."""
    # K weight gradients into fresh memory, then their products.
    rows = _time(2 * K * N * i * o + 4 * K * K * i * o, 4 * K * i * o)
    return N * N <= GHOST_LIMIT and _outer_ghost(K, 1, N, i, o) < rows


@lru_cache(maxsize=1024)
def conv_ghost_beats_direct(
    K: int, B: int, r: int, C: int, o: int, kernel: tuple[int, ...], pixels: int, T: int, limit: int
) -> bool:
    """
    For a plain 2-D convolution over B samples of r images each.

    The Gram matrix of patches, as shifted sums of that of pixels, takes a fraction of the flops.

    :param kernel: Height and width.
    :param pixels: Input positions of an image.
    :param T: Output positions of an image.
    :param limit: Entries that the matrix [N, N] may have.
    """
    M, N = B * r * pixels, B * r * T
    if max(2 * N * N, M * M) > 2 * limit:
        return False
    height, width = kernel
    shifts = 3 * (width * M * N + height * N * N)
    ghost = (
        _half(K, N) * _time(2 * M * M * C, M * M + shifts)
        + _contraction(K, B, r * T, o, N * N)
        + _time(0, 2 * K * N * o)  # positions have to come before channels
    )
    patch = C * math.prod(kernel)
    return ghost < _direct(K * B, r * T, o * patch) + _time(0, B * r * patch * T)


def batch_beats_single_passes(K: int, results: Sequence[int], weights: Sequence[int]) -> bool:
    """
    Whether K losses should go through some operations together.

    A batched call takes as long as four single ones, and half of what it writes is too large for
    the caches. Weights that are too large for them are read once, and not once for each loss.

    :param results: The numbers of entries of their results, for one loss.
    :param weights: Those of the parameters.
    """
    read = sum(weight for weight in weights if weight * _ENTRY > _CACHE)
    saved = len(results) * (K - 4) * _CALL + (K - 1) * read * _ENTRY / _BYTES
    return saved > K * sum(results) * _ENTRY / _BYTES / 2
