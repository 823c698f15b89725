"""Few rows are projected in numpy, as many of them are by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jdcore.linalg import add_proximal, gramian
from jdplugins.standard._solvers import NativeDualConeSolver, _cone_of_few
from jdplugins.standard._solvers._cone_of_few import project_few


@pytest.mark.parametrize("m", [9, 16, 24, 32])
@pytest.mark.parametrize("n", [40, 100])
@pytest.mark.parametrize("many", [True, False])
def test_they_are_the_same_with_zero_rows_and_zero_preferences(m: int, n: int, many: bool) -> None:
    generator = torch.Generator().manual_seed(m + n)
    rows = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rows[2] = 0.0
    rows[5] *= 1e6
    G = add_proximal(gramian(rows).numpy(), 4e-12)
    shares = torch.rand(m, generator=generator, dtype=torch.float64)
    shares[[3, 7]] = 0.0
    U = (torch.diag(shares) if many else shares[None]).numpy()

    found = project_few(G, U)
    expected = NativeDualConeSolver().project(torch.from_numpy(G), torch.from_numpy(U)).numpy()

    assert found is not None
    assert (found >= U).all()
    scale = float(rows.norm(dim=1).max())
    np.testing.assert_allclose(found @ rows.numpy(), expected @ rows.numpy(), atol=1e-11 * scale)


@pytest.mark.parametrize(
    ("m", "many"), [(6, True), (8, True), (12, False), (32, True), (32, False), (128, True)]
)
@pytest.mark.parametrize("part", [0.9, 1.0])  # all of the mean: the rows cancel
def test_rows_that_nearly_all_conflict_take_one_inverse(
    m: int, many: bool, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverses: list[int] = []
    invert = _cone_of_few._inverse
    monkeypatch.setattr(_cone_of_few, "_inverse", lambda A: inverses.append(len(A)) or invert(A))
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, 40 * m, generator=generator, dtype=torch.float64)
    rows -= part * rows.mean(0)
    rows *= torch.logspace(-3, 3, m, dtype=torch.float64)[:, None]
    G = add_proximal(gramian(rows).numpy(), 4e-12)
    shares = np.linspace(1.0, 2.0, m)
    U = np.diag(shares) if many else (shares / rows.norm(dim=1).numpy())[None]

    found = NativeDualConeSolver()(G, U)

    assert inverses == [m]
    assert (found >= U).all()
    expected = NativeDualConeSolver().project(torch.from_numpy(G), torch.from_numpy(U)).numpy()
    lengths = rows.norm(dim=1, keepdim=True).numpy() if many else 1.0
    updates = [V @ rows.numpy() / lengths for V in (found, expected)]
    np.testing.assert_allclose(*updates, atol=1e-8)


@pytest.mark.parametrize("length", [0.0, 1e-161, 1e-155])
def test_rows_that_nearly_all_conflict_may_be_of_no_length(length: float) -> None:
    rows = torch.eye(8, dtype=torch.float64) - 0.2
    rows[0] *= length
    G = gramian(rows).numpy()
    U = np.eye(8)

    found = NativeDualConeSolver()(G, U) @ rows.numpy()

    expected = NativeDualConeSolver().project(torch.from_numpy(G), torch.from_numpy(U)).numpy()
    np.testing.assert_allclose(found, expected @ rows.numpy(), atol=1e-9)


@pytest.mark.parametrize("m", [8, 32, 128])
def test_rows_that_nearly_all_conflict_may_have_rounded_products(m: int) -> None:
    conflicts = np.random.default_rng(m).random((m, m))
    conflicts += conflicts.T
    np.fill_diagonal(conflicts, 0.0)
    lengths = np.sqrt(conflicts.sum(1))
    # Rows that cancel have this Gramian without the last term, which makes it that of no rows.
    G = np.eye(m) - conflicts / np.outer(lengths, lengths) - 1e-3 * np.eye(m)

    found = NativeDualConeSolver()(G, np.eye(m))

    expected = NativeDualConeSolver().project(torch.from_numpy(G), torch.eye(m).double()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("k", "m"), [(0, 0), (1, 0), (0, 3), (0, 40)])
def test_nothing_to_project_has_the_shape_that_was_asked_for(k: int, m: int) -> None:
    found = NativeDualConeSolver()(np.eye(m), np.zeros((k, m)))

    assert found.shape == (k, m)


def test_what_comes_from_a_singular_block_is_no_start() -> None:
    random = np.random.default_rng(103)
    half = random.standard_normal((48, 192))
    rows = np.concatenate([half, -2.0 * half])
    gramian, solver = rows @ rows.T, NativeDualConeSolver()
    references = np.abs(random.standard_normal((60, 96))) * (random.random((60, 96)) < 0.5)

    for u in references:
        # Every vector is in the span of opposite rows, and its projection is zero.
        update = solver(gramian, u[None])[0] @ rows
        assert np.abs(update).max() < 1e-10 * np.abs(u @ rows).max()
