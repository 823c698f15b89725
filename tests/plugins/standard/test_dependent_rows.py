"""Rows of every kind of dependence are solved, by little more work than independent rows take."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jdcore.errors import UnsolvedWarning
from jdcore.linalg import (
    _pivoting,
    add_proximal,
    equilibrate,
    lcp_residual,
    natural_residual,
    proximal_level,
)
from jdcore.linalg._pivoting import PassiveSets
from jdplugins.standard._solvers import (
    NativeDualConeSolver,
    NativeMinNormSolver,
    _cone_of_few,
    _guess,
    _lcp,
    _parametric,
)
from jdplugins.standard._solvers._active_set import ActiveSet
from jdplugins.standard._solvers._faces import find_face
from jdplugins.standard._solvers._guess import Splitting
from jdplugins.standard._solvers._lcp import solve_lcps
from jdplugins.standard._solvers._parametric import _Paths
from tests.plugins.standard.dependent_rows import KINDS

# Of the work that independent rows take.
LIMIT = 5.0


def gramian_of(kind: str, m: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> np.ndarray:
    rows = torch.from_numpy(KINDS[kind](m, np.random.default_rng(seed))).to(dtype).double().numpy()
    return add_proximal(rows @ rows.T, proximal_level(m, dtype))


def cosines(kind: str, m: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    C = torch.from_numpy(equilibrate(gramian_of(kind, m, seed, dtype))[0])
    C.diagonal().fill_(1.0)
    return C


class _Work:
    """
    Multiplications of what costs most.

    Those of guesses are eight times as fast as those of factorisations, and those of parametric
    pivots five times: 4.9 and 0.85 in a nanosecond for 64 rows on a CPU.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done = 0.0
        factors, steps, solve = PassiveSets.factors, Splitting._steps, ActiveSet.solve
        batch, pivot = _pivoting._batch_of_few, _Paths._pivot

        def counted(sets: PassiveSets, passive: Tensor, sizes: np.ndarray) -> Any:
            smaller = np.minimum(sizes, passive.shape[1] - sizes).astype(np.float64)
            self.done += float((smaller**3).sum()) / 6.0
            return factors(sets, passive, sizes)

        def guessed(splitting: Splitting, B: Tensor, start: Tensor, number: int, *how: Any) -> Any:
            self.done += number * B.numel() * B.shape[2] / 8.0
            return steps(splitting, B, start, number, *how)

        def alone(method: ActiveSet, q: np.ndarray, start: np.ndarray) -> Any:
            before = method.work
            answer = solve(method, q, start)
            self.done += before - method.work
            return answer

        def factorised(padded: np.ndarray, sets: np.ndarray) -> Any:
            self.done += float((sets.sum(axis=1) ** 3.0).sum()) / 6.0
            return batch(padded, sets)

        def followed(paths: _Paths, limit: int) -> int:
            pivots = pivot(paths, limit)
            self.done += pivots * paths.Q.shape[1] ** 2 / 5.0
            return pivots

        patch.setattr(_pivoting, "_batch_of_few", factorised)
        patch.setattr(_Paths, "_pivot", followed)
        patch.setattr(PassiveSets, "factors", counted)
        patch.setattr(Splitting, "_steps", guessed)
        patch.setattr(ActiveSet, "solve", alone)


def work(kind: str, m: int, seed: int) -> float:
    C = cosines(kind, m, seed)
    with pytest.MonkeyPatch.context() as patch:
        counter = _Work(patch)
        _, residuals = solve_lcps(C, C)
    assert float(residuals.max()) <= 1e-10
    return counter.done


@functools.cache
def least_work(m: int) -> float:
    return work("independent", m, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_dependent_rows_take_little_more_work_than_independent_ones(kind: str) -> None:
    m = 96
    for seed in range(2):
        assert work(kind, m, seed) <= LIMIT * least_work(m)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("one row and its opposite", 0.1), ("products of factors", 1.5), ("blocks", 0.5)],
)
def test_rows_beside_those_that_cancel_take_no_pivot_of_each(kind: str, limit: float) -> None:
    assert work(kind, 64, 0) <= limit * least_work(64)


@pytest.mark.parametrize("m", [40, 64, 160])
@pytest.mark.parametrize("times", [1.3, 4, 20])
def test_random_rows_are_solved_by_steps_alone(
    m: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lcp, "pivot", None)
    rows = np.random.default_rng(m).standard_normal((m, int(times * m)))
    C = torch.from_numpy(equilibrate(rows @ rows.T)[0])
    Z, residuals = solve_lcps(C, C)
    assert float(residuals.max()) <= 2e-14
    assert lcp_residual(C.numpy(), C.numpy(), Z.numpy()).max() <= 2e-14


@pytest.mark.parametrize("m", [16, 32, 128])
def test_multiples_of_one_row_take_no_pivot(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cone_of_few, "follow", None)
    monkeypatch.setattr(_lcp, "guess", None)
    G = gramian_of("one row and its opposite", m)
    V = NativeDualConeSolver()(G, np.eye(m) / m)
    assert np.abs(V.sum(axis=0) @ G).max() <= 1e-9 * G.max()  # nothing is left of any row


@pytest.mark.parametrize(
    ("kind", "all_of_them"),
    [("graded columns", False), ("sum of zero", False), ("nearly opposite", True)],
)
def test_80_rows_are_followed_pivot_by_pivot_only_where_no_guess_is_good(
    kind: str, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = 0

    def counted(C: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal followed
        followed += len(Q)
        return _parametric.follow(C, Q)

    monkeypatch.setattr(_lcp, "follow", counted)
    C = cosines(kind, 80)
    _, residuals = solve_lcps(C, C)
    assert float(residuals.max()) <= 1e-11
    assert (followed == 80) == all_of_them


def test_rows_that_have_noise_of_all_sizes_go_at_their_own_pace() -> None:
    C = cosines("one row and noise", 128)
    true = solve_lcps(C, C)[0] > 0.0
    X, _ = _guess.guess(C, C, 5e-4, 0.0)

    def wrong(X: Tensor) -> list[float]:
        return [float(((x > 0.0) ^ true[:4]).double().mean()) for x in X]

    X, least = _guess.guess_again(C, C, X.float(), torch.arange(4), wrong, 1.0)
    assert least <= 0.01
    assert float(((X > 0.0) ^ true).double().mean()) <= 0.01  # 0.05 where all rows go at one pace


@pytest.mark.parametrize(
    ("kind", "own"),
    [("one row and noise", True), ("columns of all scales", False), ("nearly equal", False)],
)
def test_only_rows_that_differ_by_orders_of_magnitude_go_at_their_own_pace(
    kind: str, own: bool
) -> None:
    rho = Splitting(cosines(kind, 128), _guess._SCALES[:3], adapted=True).rho
    assert bool((rho.amax(1) > rho.amin(1)).any()) == own


@pytest.mark.parametrize(
    ("kind", "limit"),  # from far: 3.6, 3.2 and 0.42
    [("weakly stationary", 1.0), ("columns of all scales", 1.0), ("half rank", 0.3)],
)
def test_the_shortest_of_many_that_matter_is_found_from_near(kind: str, limit: float) -> None:
    m, work = 128, 0.0
    solve = ActiveSet.solve

    def counted(method: ActiveSet, q: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
        nonlocal work
        before = method.work
        answer = solve(method, q, start)
        work += before - method.work
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActiveSet, "solve", counted)
        for seed in range(1, 3):
            NativeMinNormSolver()(gramian_of(kind, m, seed))
    assert work <= limit * m**3


@pytest.mark.slow
@pytest.mark.parametrize("m", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_for_more_rows_and_draws(kind: str, m: int) -> None:
    for seed in range(2, 4 if m == 256 else 8):
        assert work(kind, m, seed) <= 1.5 * LIMIT * least_work(m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_dtypes_are_solved(kind: str, dtype: torch.dtype) -> None:
    for m in (16, 64):
        C = cosines(kind, m, 1, dtype)
        Z, residuals = solve_lcps(C, C)
        assert float(residuals.max()) <= 1e-10
        assert lcp_residual(C.numpy(), C.numpy(), Z.numpy()).max() <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_projections_do_not_depend_on_the_order_of_rows(kind: str) -> None:
    m = 64
    G, U = gramian_of(kind, m, 2), np.full((1, m), 1.0 / m)
    order = np.random.default_rng(0).permutation(m)
    for references in (np.diag(U[0]), U):
        v = NativeDualConeSolver()(G, references).sum(axis=0)
        mixed = NativeDualConeSolver()(G[np.ix_(order, order)], references[:, order]).sum(axis=0)
        difference = v[order] - mixed
        distance = np.sqrt(max(difference @ G[np.ix_(order, order)] @ difference, 0.0))
        assert distance <= 1e-4 * np.sqrt(G.diagonal()).mean()


@pytest.mark.parametrize("m", [8, 20, 64])
@pytest.mark.parametrize("kind", ["equal", "opposite", "spread"])
def test_float64_rows_that_nearly_depend_are_right_to_a_thousandth_of_their_mean(
    kind: str, m: int
) -> None:
    level = proximal_level(m, torch.float64)
    for exponent in range(4, 10):
        random = np.random.default_rng(exponent)
        rows = random.standard_normal((m // 2, 2 * m))
        noise = 10.0**-exponent * random.standard_normal((m, 2 * m))
        if kind == "spread":  # half as many dimensions as rows, but for noise
            rows = np.pad(random.standard_normal((m, m // 2)), ((0, 0), (0, 2 * m - m // 2)))
        else:
            rows = np.concatenate([rows, rows if kind == "equal" else -rows])
            noise[: m // 2] = 0.0
        rows += noise
        order = random.permutation(m)
        updates = []
        for turned in (rows, rows[order]):
            G = add_proximal(turned @ turned.T, level)
            updates.append(NativeDualConeSolver()(G, np.eye(m) / m).sum(axis=0) @ turned)
        difference = np.linalg.norm(updates[0] - updates[1])
        assert difference <= 1e-3 * np.linalg.norm(rows.mean(axis=0))


# -- rows that cancel ------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [16, 64, 128])
def test_the_rows_that_cancel_are_found(m: int) -> None:
    face = find_face(cosines("weakly stationary", m))
    assert face is not None
    assert face.inside.tolist() == list(range(int(0.6 * m)))
    assert float(face.v.min()) > 0.0
    assert float((face.C[:, face.inside] @ face.v).abs().max()) <= 1e-7


@pytest.mark.parametrize("kind", ["independent", "thick cone", "fan", "nearly equal"])
def test_rows_none_of_which_cancel_have_no_such_face(kind: str) -> None:
    assert find_face(cosines(kind, 64)) is None


def test_all_other_rows_are_solved_for_beside_those_that_cancel() -> None:
    # The first two rows cancel; the third one conflicts with the fourth once they are gone.
    rows = np.array([[1.0, 0, 0], [-2.0, 0, 0], [0.5, 1.0, 0], [0.5, -0.5, 0.5]])
    C = torch.from_numpy(equilibrate(add_proximal(rows @ rows.T, 3.6e-12))[0])
    face = find_face(C)
    assert face is not None
    assert face.inside.tolist() == [0, 1]
    Z = face.solve(C, torch.zeros_like(C), lambda C, Q: solve_lcps(C, Q)[0])
    assert float(natural_residual(C, C, Z).max()) <= 1e-10
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    x = (Z.numpy() + np.eye(4)) @ unit
    # Row 2 without its part along the first axis is (0, 1, 0), row 3 (0, -1/2, 1/2): each is
    # projected onto what is orthogonal to the other.
    expected = np.array([[0, 0, 0], [0, 0, 0], [0, 0.5, 0.5], [0, 0, 0.5]])
    expected /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(x, expected, atol=1e-9)


def test_rows_that_cancel_but_for_rounding_are_seen_by_the_others() -> None:
    # Weights of all but the last two rows are large, and the last two see their rounding.
    C = cosines("weakly stationary", 64, 2)
    face = find_face(C)
    assert face is not None
    assert float((C[face.outside][:, face.inside] @ face.v).abs().max()) > 1e-10
    Z = face.solve(C, torch.zeros_like(C), lambda C, Q: solve_lcps(C, Q)[0])
    assert float(natural_residual(C, C, Z).max()) <= 2e-10


def test_others_that_agree_on_one_direction_only_are_solved_for_at_once() -> None:
    # Beside the rows that cancel, what is left of some others is short, and so its cosines are
    # rounding: they are not semi-definite, and no method would end.
    C = cosines("weakly stationary", 256, 0, torch.float64)
    face = find_face(C)
    assert face is not None
    left: list[Tensor] = []

    def solver(C: Tensor, Q: Tensor) -> Tensor:
        left.append(C)
        return solve_lcps(C, Q)[0]

    Z = face.solve(C, torch.zeros_like(C), solver)
    assert float(natural_residual(C, C, Z).max()) <= 1e-10
    for matrix in left:
        assert float(torch.linalg.eigvalsh(matrix).min()) >= -1e-12


@pytest.mark.parametrize("m", [40, 130])
def test_float64_rows_that_are_nearly_opposite_are_solved_whatever_their_order(m: int) -> None:
    # What decides between them is of the order of 1e-8 of their cosines.
    for seed in range(4):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((m // 2, 3 * m // 2))
        rows = np.concatenate([rows, 1e-4 * random.standard_normal(rows.shape) - rows])
        order = random.permutation(m)
        updates = []
        for turned in (rows, rows[order]):
            G = add_proximal(turned @ turned.T, proximal_level(m, torch.float64))
            updates.append(NativeDualConeSolver()(G, np.eye(m) / m).sum(axis=0) @ turned)
        difference = np.linalg.norm(updates[0] - updates[1])
        assert difference <= 2e-4 * np.linalg.norm(rows.mean(axis=0))


# -- what is not solved ----------------------------------------------------------------------------


def test_what_would_take_too_long_is_given_up_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G, U = gramian_of("products of factors", 64, seed=2), np.eye(64)
    monkeypatch.setattr(_parametric, "WORK", 0.0)
    monkeypatch.setattr(_guess, "_MORE_STEPS", 0)
    with pytest.warns(UnsolvedWarning) as caught:
        V = NativeDualConeSolver()(G, U)
    [warning] = caught
    assert isinstance(warning.message, UnsolvedWarning)
    assert warning.message.residual > 1e-10
    assert (V >= U).all()
    lengths = np.einsum("ij,jk,ik->i", V, G, V)
    assert (lengths <= G.diagonal() * (1.0 + 1e-9)).all()
