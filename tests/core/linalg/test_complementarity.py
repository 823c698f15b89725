"""Residual and refinement of answers to linear complementarity problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jdcore.linalg import lcp_residual, natural_residual, pivot, refine_lcp

Array = NDArray[np.float64]


def cosines(m: int, n: int, seed: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((m, n))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    C = rows @ rows.T
    np.fill_diagonal(C, 1.0)
    return C


def solve_by_enumeration(C: Array, q: Array) -> Array:
    """The solution, by trying every set of positive entries."""
    m = len(q)
    for size in range(m + 1):
        for chosen in itertools.combinations(range(m), size):
            F = list(chosen)
            z = np.zeros(m)
            z[F] = np.linalg.solve(C[np.ix_(F, F)], -q[F])
            if (z >= 0.0).all() and (C @ z + q >= -1e-12).all():
                return z
    raise AssertionError("no solution")


def test_the_residual_is_the_largest_violation_relative_to_the_answer() -> None:
    C = np.array([[1.0, 0.5], [0.5, 1.0]])
    Q = np.array([[-1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    # y = C z + q: (0, 0.5) for the first; (2, 1.5) for the second, so min(z, y) = (2, 0) and
    # 2 / (1 + 3) is left; z = 0 solves the third.
    Z = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]])

    np.testing.assert_array_equal(lcp_residual(C, Q, Z), [0.0, 0.5, 0.0])


@given(m=st.integers(1, 6), seed=st.integers(0, 2**16), digits=st.integers(2, 6))
def test_an_answer_with_a_few_digits_is_refined_to_all_of_them(
    m: int, seed: int, digits: int
) -> None:
    random = np.random.default_rng(seed)
    C, q = cosines(m, m + 2, seed), random.uniform(-1.0, 1.0, m)
    exact = solve_by_enumeration(C, q)
    rough = np.maximum(exact + 10.0**-digits * random.uniform(-1.0, 1.0, m), 0.0)

    refined, residuals = refine_lcp(C, q[None], rough[None])

    assert residuals[0] <= 1e-13
    assert (refined >= 0.0).all()
    # The condition of C tells how far an answer with such a residual can be from the solution.
    bound = 1e-12 * np.linalg.cond(C) * (1.0 + exact.max())
    np.testing.assert_allclose(refined[0], exact, rtol=0.0, atol=bound)


def test_dependent_rows_are_refined_too() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [-0.6, 0.8]])  # the first two are the same
    C = rows @ rows.T
    q = C @ np.array([0.0, 0.0, 1.0])

    refined, residuals = refine_lcp(C, q[None], np.array([[0.31, 0.28, 0.01]]))

    # Projecting the third row takes away its part along the first: z_0 + z_1 = 0.6.
    assert residuals[0] <= 1e-15
    np.testing.assert_allclose(refined[0, :2].sum(), 0.6, rtol=1e-14)
    np.testing.assert_allclose(refined[0, 2], 0.0, atol=1e-14)


def test_an_answer_that_is_far_off_does_not_get_worse() -> None:
    C = cosines(40, 40, seed=0)
    Q = np.random.default_rng(1).uniform(-1.0, 1.0, (20, 40))
    wild = np.random.default_rng(2).uniform(0.0, 5.0, (20, 40))
    given_answers = wild.copy()

    refined, residuals = refine_lcp(C, Q, wild)

    np.testing.assert_array_equal(wild, given_answers)
    assert (residuals <= lcp_residual(C, Q, wild)).all()
    np.testing.assert_array_equal(residuals, lcp_residual(C, Q, refined))


def test_every_row_is_refined_as_if_it_were_alone() -> None:
    C = cosines(9, 12, seed=3)
    Q = C[:5] - 0.3
    rough = np.maximum(-Q, 0.0)

    together, _ = refine_lcp(C, Q, rough)
    alone = [refine_lcp(C, Q[i : i + 1], rough[i : i + 1])[0][0] for i in range(5)]

    np.testing.assert_allclose(together, alone, atol=1e-14)


@pytest.mark.parametrize("m", [2, 7, 40])
@pytest.mark.parametrize("delta", [0.0, 1e-8])
def test_pivoting_takes_any_diagonal_and_number_of_rows(m: int, delta: float) -> None:
    a = np.linspace(0.2, 1.0, m)
    C = torch.from_numpy(cosines(m, 2 * m, seed=m) + np.outer(a, a))
    Q = torch.from_numpy(np.random.default_rng(m).uniform(-1.0, 1.0, (5, m)))
    for q in (Q, Q[:1]):
        passive = q < 0.0

        Z, residuals = pivot(C, q, passive, delta=delta)

        assert float(natural_residual(C, q, Z).max()) <= 1e-13
        assert float(residuals.max()) <= 1e-13
        assert torch.equal(passive, Z > 0.0)


def test_of_two_rows_that_are_nearly_opposite_one_is_exchanged_at_a_time() -> None:
    # With all rows in, both of most pairs are negative by 1e4, and one of them has to go.
    random = np.random.default_rng(0)
    half = random.standard_normal((40, 160))
    rows = np.concatenate([half, 1e-4 * random.standard_normal(half.shape) - half])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    C = torch.from_numpy(rows @ rows.T)
    passive = torch.ones_like(C, dtype=torch.bool)

    _, residuals = pivot(C, C, passive)

    assert float((residuals <= 1e-11).double().mean()) >= 0.9


@pytest.mark.parametrize("m", [8, 40, 100])
@pytest.mark.parametrize("delta", [0.0, 1e-10])
def test_no_problem_has_no_answer(m: int, delta: float) -> None:
    none = torch.zeros(0, m, dtype=torch.float64)
    Z, residuals = pivot(torch.eye(m).double(), none, none > 0.0, delta=delta)
    assert Z.shape == (0, m)
    assert residuals.shape == (0,)


@pytest.mark.parametrize(("k", "m"), [(0, 3), (2, 0), (0, 0)])
def test_no_problems_and_no_rows_are_fine(k: int, m: int) -> None:
    refined, residuals = refine_lcp(np.eye(m), np.zeros((k, m)), np.zeros((k, m)))

    assert refined.shape == (k, m)
    assert residuals.shape == (k,)
