"""Both routes, numpy for small matrices and torch beyond, give what the definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jdcore.linalg import cholesky, eigh, factorize, product, solve, substitute

SIZES = (1, 3, 24, 40, 96, 130)


def positive(m: int) -> np.ndarray:
    rows = np.random.default_rng(m).standard_normal((m, 2 * m))
    return rows @ rows.T / m


@pytest.mark.parametrize("m", SIZES)
def test_products_of_matrices_and_vectors(m: int) -> None:
    A, B = positive(m), np.random.default_rng(0).standard_normal((m, m))

    np.testing.assert_allclose(product(A, B), A @ B, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product(A, B[0]), A @ B[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product(B[0], A), B[0] @ A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", SIZES)
def test_solutions_satisfy_their_equations(m: int) -> None:
    A, B = positive(m), np.random.default_rng(0).standard_normal((m, 3))

    np.testing.assert_allclose(A @ solve(A, B), B, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(A @ solve(A, B[:, 0]), B[:, 0], rtol=1e-9, atol=1e-9)
    batch = solve(np.stack([A, 2.0 * A]), np.stack([B, B]))
    np.testing.assert_allclose(batch[0], 2.0 * batch[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", SIZES)
def test_factors_multiply_to_the_matrix(m: int) -> None:
    A = positive(m)
    factor = cholesky(A)
    values, vectors = eigh(A)

    assert np.array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.T, A, rtol=1e-12, atol=1e-12)
    assert (np.diff(values) >= 0.0).all()
    np.testing.assert_allclose((vectors * values) @ vectors.T, A, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [8, 96, 128, 160, 192])
def test_factors_of_any_size_are_those_of_torch(m: int, dtype: torch.dtype) -> None:
    A = torch.from_numpy(np.stack([positive(m), positive(m), positive(m)])).to(dtype)
    A[1].diagonal()[m // 2] = -1.0
    before = A.clone()
    expected, places = torch.linalg.cholesky_ex(A)
    factors, failed = factorize(A)
    alone, fine = factorize(A[2])

    assert torch.equal(A, before)
    assert factors.shape == A.shape
    assert failed.tolist() == places.tolist() == [0, m // 2 + 1, 0]
    torch.testing.assert_close(factors[0], expected[0])
    torch.testing.assert_close(alone, expected[2])
    assert fine.item() == 0
    right = torch.ones(m, 2, dtype=dtype)
    torch.testing.assert_close(substitute(alone, right), torch.cholesky_solve(right, expected[2]))
    assert alone.mT.is_contiguous()  # or each solve would copy it


def test_sizes_that_lapack_is_slow_for_are_factorised_as_their_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    cholesky_ex = torch.linalg.cholesky_ex

    def counted(A: torch.Tensor) -> object:
        sizes.append(A.shape[-1])
        return cholesky_ex(A)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    for m in (64, 127, 128, 130, 512):
        factorize(torch.eye(m))
    assert sizes == [64, 127, 129, 130, 513]


@pytest.mark.parametrize("m", [3, 130])
def test_singular_and_indefinite_matrices_are_refused(m: int) -> None:
    with pytest.raises(np.linalg.LinAlgError):
        solve(np.zeros((m, m)), np.ones(m))
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(-np.eye(m))
