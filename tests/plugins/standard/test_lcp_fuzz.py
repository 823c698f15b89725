"""Thousands of projections on rows of every kind of dependence: solved, feasible and short."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from jdcore.errors import UnsolvedWarning
from jdcore.linalg import add_proximal, equilibrate, lcp_residual, proximal_level
from jdplugins.standard._solvers import NativeDualConeSolver, solve_one
from tests.plugins.standard.dependent_rows import KINDS as DEPENDENT

KINDS = (
    *("gauss", "conflict", "cancelling", "rank", "thin", "near", "duplicates", "opposites"),
    *("zeros", "scales", "rounded", "sliver"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def draw(kind: str, m: int, random: np.random.Generator) -> np.ndarray:
    if kind in DEPENDENT:
        return DEPENDENT[kind](m, random)
    n = int(random.choice([2, 3, m, 2 * m, 200]))
    rows = random.standard_normal((m, n))
    half = (m + 1) // 2
    if kind == "conflict":
        rows -= 0.99 * rows.mean(axis=0)
    elif kind == "cancelling":
        rows -= rows.mean(axis=0)
    elif kind in ("rank", "rounded"):
        rows = random.standard_normal((m, half)) @ random.standard_normal((half, n))
    elif kind == "thin":
        rows = rows[:, : max(1, m // 8 + 1)]
    elif kind == "near":
        signs = random.choice([-1.0, 1.0], (half, 1))
        twins = signs * rows[:half] + 1e-4 * random.standard_normal((half, n))
        rows = np.concatenate([rows[:half], twins])[:m]
    elif kind == "duplicates":
        rows = np.repeat(rows[:half], 2, axis=0)[:m]
    elif kind == "opposites":
        rows = np.concatenate([rows[:half], -2.0 * rows[:half]])[:m]
    elif kind == "zeros":
        rows[random.random(m) < 0.3] = 0.0
    elif kind == "scales":
        rows *= 10.0 ** random.uniform(-6, 6, (m, 1))
    elif kind == "sliver" and n > 1:
        rows[:half, 0] = 0.0
        rows[half:, 0] = np.abs(rows[half:, 0])
        rows[0] -= rows[:half].sum(axis=0)
    return rows.astype(np.float32).astype(np.float64) if kind == "rounded" else rows


def check(kind: str, m: int, dtype: torch.dtype, random: np.random.Generator) -> float:
    """The largest residual of projections of all rows, of the mean, and of a mixed vector."""
    rows = torch.from_numpy(draw(kind, m, random)).to(dtype).double().numpy()
    G = add_proximal(rows @ rows.T, proximal_level(m, dtype))
    C, norms, _ = equilibrate(G)
    worst = 0.0
    for U in (np.eye(m), np.full((1, m), 1.0 / m), random.standard_normal((1, m))):
        V = NativeDualConeSolver()(G, U)
        assert (V >= U).all()
        before, after = (np.einsum("ij,jk,ik->i", W, G, W) for W in (U, V))
        assert (after <= before * (1.0 + 1e-7) + 1e-14 * G.max()).all()
        scaled = U * norms
        scales = np.abs(scaled).max(axis=1, keepdims=True)
        scales[scales == 0.0] = 1.0
        Z = (V - U) * norms / scales
        worst = max(worst, float(lcp_residual(C, scaled / scales @ C, Z).max()))
    if norms.min() > 0.0:
        a = norms.min() / norms
        worst = max(worst, solve_one(C + np.outer(a, a), -a)[1])
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_solved(kind: str) -> None:
    random = np.random.default_rng(0)
    for m in (2, 5, 9, 20, 50):
        assert check(kind, m, DTYPES[m % 3], random) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_every_kind_are_solved(kind: str) -> None:
    random = np.random.default_rng(1)
    residuals = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        for trial in range(100):
            m = int(random.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 24, 33, 40, 48, 64]))
            residuals.append(check(kind, m, DTYPES[trial % 3], random))
    assert max(residuals) <= 1e-10
    assert np.median(residuals) <= 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEPENDENT)
def test_hundreds_of_larger_ones_are_solved(kind: str) -> None:
    random = np.random.default_rng(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        for trial in range(60):
            m = int(random.choice([8, 16, 24, 32, 40, 48, 56, 64, 72, 96]))
            assert check(kind, m, DTYPES[trial % 3], random) <= 1e-10
