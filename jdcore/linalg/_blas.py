"""
Float64 algebra on matrices of one row per objective, which heeds ``torch.set_num_threads``.

From these sizes on, numpy's own BLAS and LAPACK start as many threads as there are cores, whatever
torch was told. They wait for each other by spinning: where other processes (the workers of a data
loader, say) want the cores as well, that takes 10 to 50 times as long as one thread would. Smaller
matrices stay with numpy, which costs less to call.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from jdcore._modes import is_wrapped

_PRODUCT = 64 * 64
# Up to these sizes numpy multiplies rows by one another, or by weights, without threads.
_ENTRIES, _ROWS = 9216, 8
# Multiplications of a product of matrices up to which numpy makes it without threads.
_MULTIPLICATIONS = 1 << 18
_STRIP = 4  # rows
# More than squares of small entries lose below the range of their dtype, and float32's largest.
_TINY, _LARGEST = 1e-33, 3e38
_ARRAYS = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
_SOLVE = 96
_EIGH = 24
# From the first of these sizes on, LAPACK takes up to three times as long for multiples of the
# second one as for their neighbours: rows that are so far apart share the lines of a cache.
_ALIGNED, _STRIDE = 128, 32


def is_small(
    *blocks: Tensor,
    dtypes: Container[torch.dtype] = _ARRAYS,
    rows: int = _ROWS,
    most: int = _ENTRIES,
) -> bool:
    """
    Whether numpy can look at a matrix, and multiplies it in less time than torch takes to be asked.

    That time is the one it takes to fetch the code of each operator into the cache of a CPU.

    :param blocks: Its columns, in one block or several.
    :param dtypes: Those that they may have.
    :param rows: How many they may have.
    :param most: How many entries they may have.
    """
    entries = 0
    for block in blocks:
        entries += block.numel()
        if not (
            entries <= most
            and block.is_cpu
            and block.dtype in dtypes
            and block.shape[0] <= rows
            and type(block) is Tensor
            and not block.requires_grad
            and not block.is_neg()  # as imaginary parts of conjugates, which numpy cannot look at
            and not is_wrapped(block)
            and forward_ad._current_level < 0  # nobody asks for tangents, which numpy drops
        ):
            return False
    return True


def small_gramian(*blocks: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """
    A small matrix A in float64, and ``A Aᵀ``, exactly symmetric.

    :param blocks: Its columns, as :func:`is_small` wants them.
    :returns: The two, and what A as a vector is not longer than; infinity where entries may not be
        finite.
    """
    # What overflows or is not finite is told from the results, not by warnings of numpy. To silence
    # these takes longer than to multiply a few rows, and than to see that there will be none.
    if len(blocks) == 1:
        array = blocks[0].numpy()
        squares = float(np.vdot(array, array))  # in the dtype of A
        if squares < math.inf:
            rows = array.astype(np.float64)
            # Of a matrix times its transpose numpy computes one triangle.
            return rows, rows.dot(rows.T), math.sqrt(1.001 * squares + _TINY)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.concatenate([block.numpy() for block in blocks], 1, dtype=np.float64)
        squares = float(np.vdot(rows, rows))
        length = math.sqrt(squares + _TINY) if squares < math.inf else math.inf
        return rows, rows.dot(rows.T), length


def short_columns(m: int) -> int:
    """
    How many columns of m rows :func:`add_short_products` multiplies at once.

    So few that the BLAS of numpy neither starts threads nor arranges the factors anew before it
    multiplies them (OpenBLAS): for 8 to 16 rows that takes half of the time of one product.
    """
    return _MULTIPLICATIONS // (_STRIP * (m + 1))


def add_short_products(total: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
    """
    Add the lower triangle of ``A Aᵀ`` to a total, for a few short rows.

    Of an array times its own transpose numpy computes one triangle, by a routine that does arrange
    the factors. So a strip of rows is multiplied by all rows above it and by one more, at the end
    by a row of zeros.

    :param total: Array [m, m + 1] of at least two rows. Above the diagonal it is not to be read.
    :param rows: Array [m + 1, n] of at most :func:`short_columns`: the rows of A, and one of zeros.
    """
    m = len(total)
    strips = -(-m // _STRIP)
    # Nearly equal, so that none has a single row: a vector is multiplied by another routine, with
    # threads of its own.
    bounds = [m * i // strips for i in range(strips + 1)]
    for first, end in pairwise(bounds):
        # Not `dot`, which copies what has gaps between its rows.
        total[first:end, : end + 1] += np.matmul(rows[first:end], rows[: end + 1].T)


def small_combination(
    weights: NDArray[np.floating[Any]],
    rows: NDArray[np.floating[Any]],
    dtype: torch.dtype,
    length: float = math.inf,
) -> Tensor:
    """
    ``w A``, multiplied in the wider dtype of the two.

    :param dtype: float32 or float64, to which the result is rounded.
    :param length: As :func:`small_gramian` returns it.
    """
    # No entry is above the product of the lengths of w and A.
    if math.hypot(*weights.tolist()) * length < _LARGEST:
        return torch.from_numpy(weights.dot(rows).astype(_ARRAYS[dtype], copy=False))
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(weights.dot(rows).astype(_ARRAYS[dtype], copy=False))


@contextmanager
def one_thread(on: bool = True) -> Iterator[None]:
    """
    Small factorisations on a CPU by one thread.

    The threads of MKL wait for each other at every one of them by spinning, which takes 20 times as
    long as the arithmetic where other processes want the cores as well.

    :param on: False leaves the threads as they are, as is right for an accelerator.
    """
    threads = torch.get_num_threads()
    if not on or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def product(A: NDArray[np.float64], B: NDArray[np.float64], /) -> NDArray[np.float64]:
    """
    ``A @ B`` for a matrix and a vector, or for two matrices.

    :param A: Array [k, m] or [m].
    :param B: Array [m, l] or [m].
    """
    if max(A.size, B.size) <= _PRODUCT:
        return np.asarray(A.dot(B))  # costs half as much to call as the operator
    array: NDArray[np.float64] = torch.matmul(torch.from_numpy(A), torch.from_numpy(B)).numpy()
    return array


def solve(A: NDArray[np.float64], B: NDArray[np.float64], /) -> NDArray[np.float64]:
    """
    ``A⁻¹ B``, also for a batch.

    :param A: Regular matrices [..., m, m].
    :param B: Vector [m], or matrices [..., m, k].
    :raises numpy.linalg.LinAlgError: If a matrix is singular.
    """
    if A.shape[-1] <= _SOLVE:
        return np.asarray(np.linalg.solve(A, B), dtype=np.float64)
    # Batched, its LU factorisation is wrong with two threads in torch 2.13 (MKL 2024.2).
    with one_thread():
        solution, failed = torch.linalg.solve_ex(torch.from_numpy(A), torch.from_numpy(B))
    if failed.any():
        raise np.linalg.LinAlgError("Singular matrix")
    array: NDArray[np.float64] = solution.numpy()
    return array


def solve_definite(A: NDArray[np.float64], B: NDArray[np.float64], /) -> NDArray[np.float64]:
    """
    :func:`solve` in half the time, by Cholesky factorisation.

    :param A: Symmetric positive definite matrix [m, m]. If it is not so to working precision, it is
        solved with as any matrix.
    :param B: Vector [m] or matrix [m, k].
    :raises numpy.linalg.LinAlgError: If A is singular.
    """
    if len(A) <= _SOLVE:
        return solve(A, B)
    factor, failed = factorize(torch.from_numpy(A))
    if failed.item():
        return solve(A, B)
    columns = torch.from_numpy(B.reshape(len(A), -1))
    solution: NDArray[np.float64] = substitute(factor, columns).numpy()
    return solution.reshape(B.shape)


def factorize(A: Tensor) -> tuple[Tensor, Tensor]:
    """
    ``torch.linalg.cholesky_ex`` in a third to all of its time, on CPUs.

    :param A: Symmetric positive definite matrices [..., m, m], float32 or float64.
    :returns: Lower triangular factors [..., m, m], and where there are none: integers [...], zero
        for those that there are.
    """
    m = A.shape[-1]
    if not A.is_cpu or m < _ALIGNED or m % _STRIDE:
        return tuple(torch.linalg.cholesky_ex(A))
    bordered = torch.nn.functional.pad(A, (0, 1, 0, 1))
    bordered[..., m, m] = 1.0
    L, failed = torch.linalg.cholesky_ex(bordered)
    return L[..., :m, :m].mT.contiguous().mT, failed


def substitute(L: Tensor, B: Tensor) -> Tensor:
    """
    ``A⁻¹ B`` by a factor of A, in a fifth of the time of ``torch.cholesky_solve``, which copies it.

    :param L: Lower triangular factor, as of :func:`factorize` [..., m, m].
    :param B: Matrices [..., m, k].
    """
    half = torch.linalg.solve_triangular(L, B, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(L.mT, half, upper=True)
    return whole


def cholesky(A: NDArray[np.float64], /) -> NDArray[np.float64]:
    """
    Lower triangular factor L of ``A = L Lᵀ``.

    :param A: Symmetric positive definite matrix [m, m].
    :raises numpy.linalg.LinAlgError: If it is not positive definite to working precision.
    """
    if len(A) <= _SOLVE:
        return np.asarray(np.linalg.cholesky(A), dtype=np.float64)
    factor, failed = factorize(torch.from_numpy(A))
    if failed.item():
        raise np.linalg.LinAlgError(f"The leading minor of order {failed.item()} is not positive.")
    lower: NDArray[np.float64] = factor.numpy()
    return lower


def eigh(A: NDArray[np.float64], /) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Eigenvalues of a symmetric matrix, ascending, and its eigenvectors.

    :param A: Symmetric matrix [m, m].
    :returns: Eigenvalues [m], and a matrix whose columns are the eigenvectors [m, m].
    """
    if len(A) <= _EIGH:
        values, vectors = np.linalg.eigh(A)
        return values, vectors
    values, vectors = torch.linalg.eigh(torch.from_numpy(A))
    return values.numpy(), vectors.numpy()
