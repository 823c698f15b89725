"""The paths of the LCP solver against each other, an oracle and the conditions of optimality."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jdcore.errors import UnsolvedWarning
from jdcore.linalg import add_proximal, equilibrate, lcp_residual
from jdcore.linalg._pivoting import PassiveSets
from jdcore.testing import FAMILIES, family
from jdplugins.standard._solvers import NativeDualConeSolver, _active_set, _dual_cone, _parametric
from jdplugins.standard._solvers._active_set import ActiveSet, _Factor
from jdplugins.standard._solvers._cone_of_few import project_few
from jdplugins.standard._solvers._lcp import solve_lcps, solve_one
from jdplugins.standard._solvers._parametric import follow
from jdplugins.standard._solvers._semidefinite import nearest_semidefinite
from jdplugins.standard._solvers._tiny import roots_of, solve_few
from tests.plugins.standard.dependent_rows import KINDS as DEPENDENT
from tests.plugins.standard.oracle import LD, project_exactly

REGULAR = ("gauss", "conflict", "badscale")


def jacobian(name: str, m: int, n: int = 200, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(1000 * seed + m)
    return family(name, m, n, generator=generator).numpy()


def unit_rows(name: str, m: int, n: int = 200, seed: int = 0) -> np.ndarray:
    J = jacobian(name, m, n, seed)
    norms = np.linalg.norm(J, axis=1, keepdims=True)
    return J / np.where(norms > 0.0, norms, 1.0)


def cosines(name: str, m: int, n: int = 200, seed: int = 0) -> np.ndarray:
    J = unit_rows(name, m, n, seed)
    C = equilibrate(J @ J.T)[0]
    np.fill_diagonal(C, 1.0)  # for zero rows too
    return C


def tiny(A: np.ndarray, q: np.ndarray, size: float = 1.0) -> np.ndarray | None:
    """All entries of the answer of the tiny path."""
    rows = A.tolist()
    entries = solve_few(rows, q.tolist(), roots_of(rows), size)
    if entries is None:
        return None
    return np.array([entries.get(j, 0.0) for j in range(len(q))])


def project(G: np.ndarray, U: np.ndarray) -> np.ndarray:
    return NativeDualConeSolver()(G, U)


def solve_all(C: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All right-hand sides together."""
    Z, residuals = solve_lcps(torch.from_numpy(C), torch.from_numpy(Q))
    return Z.numpy(), residuals.numpy()


def alone(C: np.ndarray, q: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """By the active-set method alone."""
    z, residual = ActiveSet(C, 1e12).solve(q, np.zeros_like(q) if start is None else start)
    assert residual <= 1e-11
    assert lcp_residual(C, q, z) == pytest.approx(residual, abs=1e-15)
    return z


def followed(C: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """By parametric pivots alone."""
    Z, residuals = follow(C, np.atleast_2d(Q))
    assert residuals.max() <= 1e-11
    assert lcp_residual(C, Q, Z).max() == pytest.approx(residuals.max(), abs=1e-15)
    return Z.reshape(Q.shape)


def distance(J: np.ndarray, Z: np.ndarray, other: np.ndarray) -> float:
    """Largest distance between the vectors that two sets of solutions stand for."""
    return float(np.linalg.norm((Z - other) @ J, axis=-1).max())


# -- known solutions -------------------------------------------------------------------------------


def test_two_rows_with_one_passive_index() -> None:
    # C = [[1, -1/2], [-1/2, 1]], q = C e_0 = [1, -1/2]: raising z_1 to 1/2 zeroes y_1.
    C = [[1.0, -0.5], [-0.5, 1.0]]
    assert solve_few(C, [1.0, -0.5], [1.0, 1.0], 1.0) == {1: 0.5}
    z, residual = solve_one(np.array(C), np.array([1.0, -0.5]))
    assert z.tolist() == pytest.approx([0.0, 0.5], abs=1e-15)
    assert residual <= 1e-15


def test_three_rows_with_two_passive_indices() -> None:
    # Cosines -1/2, -1/2 and 1/2 with row 0: z_1 = z_2 = t with t + t/2 = 1/2, so t = 1/3.
    C = np.array([[1.0, -0.5, -0.5], [-0.5, 1.0, 0.5], [-0.5, 0.5, 1.0]])
    expected = [0.0, 1 / 3, 1 / 3]
    assert tiny(C, C[0]) == pytest.approx(expected, abs=1e-15)
    assert solve_one(C, C[0])[0] == pytest.approx(expected, abs=1e-15)
    assert solve_all(C, C)[0][0] == pytest.approx(expected, abs=1e-15)
    assert followed(C, C[0]) == pytest.approx(expected, abs=1e-12)
    assert alone(C, C[0]) == pytest.approx(expected, abs=1e-12)


def test_nothing_to_do_gives_zero_on_every_path() -> None:
    C = np.eye(4)
    q = np.array([0.0, 1.0, 0.5, 2.0])
    assert solve_few(C.tolist(), q.tolist(), [1.0] * 4, 1.0) == {}
    assert solve_one(C, q)[0].tolist() == [0.0] * 4
    assert not solve_all(C, np.array([q, q]))[0].any()
    assert not alone(C, q).any()


def test_opposite_rows_are_solved_although_the_block_is_singular() -> None:
    C = np.array([[1.0, -1.0], [-1.0, 1.0]])
    Z, _ = solve_all(C, C)
    # Each row is projected onto zero, which any combination of the two rows with equal weights is.
    np.testing.assert_allclose((Z + np.eye(2)) @ C, np.zeros((2, 2)), atol=1e-10)


def test_the_tiny_path_solves_dependent_rows_or_leaves_them_to_the_others() -> None:
    # Row 2 is the sum of rows 0 and 1; the passive set {0, 1, 2} appears on the way.
    J = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.2, 0.3]])
    C = equilibrate(J @ J.T)[0]
    for definite, limit in ((C, 1e-11), (C + 4e-12 * np.eye(4), 1e-11)):
        z = tiny(definite, definite[3])
        assert z is None or lcp_residual(definite, definite[3], z) <= limit
        z, residual = solve_one(definite, definite[3])
        assert residual <= limit


# -- the paths against each other ------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("m", [3, 4, 5, 6, 8])
def test_plain_floats_and_tensors_agree(name: str, m: int) -> None:
    C = cosines(name, m)
    Z, _ = solve_all(C, C)
    found = [tiny(C, row) for row in C]
    np.testing.assert_allclose(np.array(found), Z, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("m", [5, 12, 30, 60])
def test_one_many_and_the_active_set_method_agree(name: str, m: int) -> None:
    J, C = unit_rows(name, m), cosines(name, m)
    limit = 1e-5 if name == "neardup" else 1e-9
    Z, residuals = solve_all(C, C)
    assert residuals.max() <= 1e-10
    for i in range(0, m, max(3, m // 6)):
        assert distance(J, Z[i], solve_one(C, C[i])[0]) <= limit
        assert distance(J, Z[i], alone(C, C[i])) <= limit
        assert distance(J, Z[i], followed(C, C[i])) <= limit


@pytest.mark.parametrize("name", ["special", "lowdim", "neardup", "half", "conflict"])
def test_a_family_is_solved_at_every_precision_and_size(name: str) -> None:
    for m in (10, 33, 50, 96):
        rows = np.random.default_rng(m).standard_normal((m, m // 2)) if name == "half" else None
        J = jacobian(name, m) if rows is None else rows
        for level in (0.0, m * 2.0**-52, 3.6e-12, 1.5e-5):
            C = equilibrate(add_proximal(J @ J.T, level))[0]
            Z, residuals = solve_all(C, C)
            assert residuals.max() <= 1e-10
            assert lcp_residual(C, C, Z).max() <= 1e-10


def dependent_rows(kind: str, m: int) -> np.ndarray:
    random = np.random.default_rng(m)
    half = random.standard_normal((m // 2, 500))
    if kind == "opposites":
        return np.concatenate([half, 1e-4 * random.standard_normal(half.shape) - half])
    if kind == "clusters":  # of eight rows that are nearly equal or opposite
        centres = np.repeat(half[: m // 8], 8, axis=0) * random.choice([-1.0, 1.0], (m, 1))
        return centres + 1e-4 * random.standard_normal(centres.shape)
    rows = random.standard_normal((m, m // 2))
    rows[: m // 2] -= rows[: m // 2].mean(axis=0)  # weakly Pareto-stationary
    return rows


@pytest.mark.parametrize("kind", ["neardup", "lowdim", "special", "opposites", "clusters", "weak"])
def test_dependent_rows_take_few_factorisations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, factorised, by_active_set = 96, [], []
    J = jacobian(kind, m) if kind in FAMILIES else dependent_rows(kind, m)
    C = equilibrate(add_proximal(J @ J.T, 3.6e-12))[0]
    np.fill_diagonal(C, 1.0)
    make, solve = PassiveSets.factors, ActiveSet.solve

    def counted(self: PassiveSets, passive: torch.Tensor, sizes: np.ndarray) -> object:
        # Those of more than half of all indices cost what their complements do.
        factorised.append(np.minimum(sizes, m - sizes))
        return make(self, passive, sizes)

    def one(self: ActiveSet, q: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
        before = self.work
        answer = solve(self, q, start)
        by_active_set.append(before - self.work)
        return answer

    monkeypatch.setattr(PassiveSets, "factors", counted)
    monkeypatch.setattr(ActiveSet, "solve", one)
    _, residuals = solve_all(C, C)

    assert residuals.max() <= 1e-11
    # What a factorisation of half of the rows costs, for every one of them: 2 for random rows.
    halves = (np.concatenate(factorised) / (m / 2)) ** 3
    assert halves.sum() <= 8 * m
    assert sum(by_active_set) * 6.0 / (m / 2) ** 3 <= 4 * m


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FAMILIES, "opposites", "clusters", "weak", "low rank"])
def test_hundreds_of_rows_of_any_kind_are_solved(kind: str) -> None:
    m = 256
    if kind == "low rank":
        C = low_rank(m, 20)
    else:
        J = jacobian(kind, m, 1000) if kind in FAMILIES else dependent_rows(kind, m)
        C = equilibrate(add_proximal(J @ J.T, 3.6e-12))[0]
        np.fill_diagonal(C, 1.0)
    for Z, residuals in (solve_all(C, C), solve_one(C, C.mean(axis=0))):
        assert np.max(residuals) <= 1e-11
        assert (Z >= 0.0).all()


def low_rank(m: int, rank: int) -> np.ndarray:
    """Cosines of more rows than their number of columns, some of which span a part only."""
    random = np.random.default_rng(m)
    rows = random.standard_normal((m, rank))
    rows[: m // 2, rank // 2 :] = 0.0  # these cancel among themselves
    rows[:, -1] = 2.0 * np.abs(rows[:, -1]) + 1.0 * (np.arange(m) >= m // 2)
    return equilibrate(add_proximal(rows @ rows.T, 3.6e-12))[0]


KINDS = [*FAMILIES, "opposites", "clusters", "weak", "low rank"]


def unit_cosines(kind: str, m: int) -> np.ndarray:
    """The cosines of rows of a kind [m, m], with ones on the diagonal for zero rows, too."""
    J = jacobian(kind, m) if kind in FAMILIES else dependent_rows(kind, m)
    C = low_rank(m, 8) if kind == "low rank" else equilibrate(add_proximal(J @ J.T, 3.6e-12))[0]
    np.fill_diagonal(C, 1.0)
    return C


@pytest.mark.parametrize("kind", KINDS)
def test_the_active_set_method_ends_wherever_it_begins(kind: str) -> None:
    m = 48
    C = unit_cosines(kind, m)
    random = np.random.default_rng(0)
    for q in (C[0], C[m // 2], C[-1], C.mean(axis=0)):
        for start in (np.zeros(m), np.ones(m), 1e3 * random.random(m)):
            before = start.copy()
            method = ActiveSet(C, 1e12)
            z, residual = method.solve(q, start)
            assert residual <= 1e-11
            assert (z >= 0.0).all()
            assert (start == before).all()
            # No more factorisations than some per row.
            assert 1e12 - method.work <= 8 * m * m**3 / 6.0


@pytest.mark.parametrize("kind", ["neardup", "weak", "opposites"])
def test_a_factor_that_changes_saves_most_factorisations(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_active_set, "_SMALL", 0)
    m, C, works = 120, unit_cosines(kind, 120), []
    answers: list[np.ndarray] = []
    for worn in (None, property(lambda factor: factor.is_changed)):
        if worn is not None:
            monkeypatch.setattr(_Factor, "is_worn", worn)
        method = ActiveSet(C, 1e12)
        for q in (C[0], C[m // 2], C.mean(axis=0)):
            z, residual = method.solve(q, np.zeros(m))
            assert residual <= 1e-11
            answers.append(z)
        works.append(1e12 - method.work)
    for z, other in zip(answers[:3], answers[3:], strict=True):
        assert np.abs(C @ (z - other)).max() <= 1e-9
    assert works[0] < 0.5 * works[1]


@pytest.mark.parametrize("first", [[], [0, 3, 4, 7], list(range(9))])
def test_a_factor_solves_on_a_set_that_changes(first: list[int]) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((9, 12))
    C, b = rows @ rows.T / 12.0, random.standard_normal(9)
    passive = np.zeros(9, np.bool_)
    passive[first] = True
    factor = _Factor(C, passive)
    # Entries join, leave, come back and go again, alone and together.
    for entries in ([1], [0, 1, 3], [5, 3], [0], [2, 4, 5, 6], [2, 7], [1, 8], list(range(9))):
        factor.exchange(np.array(entries))
        passive[entries] ^= True
        expected = np.zeros(9)
        expected[passive] = np.linalg.solve(C[np.ix_(passive, passive)], b[passive])
        np.testing.assert_allclose(factor.solve(b), expected, atol=1e-9)
        assert not factor.solve(b)[~passive].any()
    assert factor.is_changed


@pytest.mark.parametrize("kind", ["products of factors", "weakly stationary"])
def test_what_a_changed_factor_leaves_to_rounding_lets_no_entry_join(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_active_set, "_SMALL", 0)
    for seed in range(8):
        rows = DEPENDENT[kind](24, np.random.default_rng(seed))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        C = rows @ rows.T + 3.6e-12 * np.eye(24)
        for q in (*C, C.mean(axis=0)):
            assert ActiveSet(C, 1e12).solve(q, np.zeros(24))[1] <= 1e-12


def test_the_active_set_method_leaves_an_indefinite_matrix_alone() -> None:
    m = 100
    C, q = np.full((m, m), -0.5) + 1.5 * np.eye(m), -np.ones(m)
    z, residual = ActiveSet(C, 1e12).solve(q, np.ones(m))
    assert (z == 1.0).all()
    assert residual == pytest.approx(lcp_residual(C, q, z))


def test_the_active_set_method_gives_the_best_it_has_where_work_ends() -> None:
    C = low_rank(60, 8)
    z, residual = ActiveSet(C, 0.0).solve(C[0], np.zeros(60))
    assert not z.any()
    assert residual == pytest.approx(-C[0].min())


@pytest.mark.parametrize("kind", KINDS)
def test_parametric_pivots_end_with_the_solution(kind: str) -> None:
    m = 48
    C = unit_cosines(kind, m)
    Q = np.stack([C[0], C[m // 2], C[-1], C.mean(axis=0), np.ones(m)])
    before = Q.copy()
    Z = followed(C, Q)
    assert (before == Q).all()
    assert (Z >= 0.0).all()
    assert not Z[4].any()
    # Rows do not depend on which others are solved with them.
    for q, z in zip(Q, Z, strict=True):
        C_z = C @ (followed(C, q) - z)
        assert np.abs(C_z).max() <= 1e-9


def test_parametric_pivots_take_two_exchanges_of_two_rows() -> None:
    # z is positive where q < 0, so the first row alone: z = 1, y = (0, 1/2).
    C = np.array([[1.0, -0.5], [-0.5, 1.0]])
    assert followed(C, np.array([-1.0, 1.0])) == pytest.approx([1.0, 0.0], abs=1e-12)
    # Both: z = C⁻¹ (1, 1) = (2, 2).
    assert followed(C, np.array([-1.0, -1.0])) == pytest.approx([2.0, 2.0], abs=1e-12)
    # The second one follows the first: y of z = (1, 0) would be (0, -0.2); z = C⁻¹ (1, -0.3).
    expected = [(1.0 - 0.15) / 0.75, (0.5 - 0.3) / 0.75]
    assert followed(C, np.array([-1.0, 0.3])) == pytest.approx(expected, abs=1e-12)


def test_parametric_pivots_say_how_far_they_came_where_work_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_parametric, "WORK", 0.0)
    C = low_rank(60, 8)
    Z, residuals = follow(C, C[:3])
    assert (residuals > 1e-3).all()
    np.testing.assert_allclose(lcp_residual(C, C[:3], Z), residuals, atol=1e-15)


def test_matrices_that_are_not_semidefinite_end_without_a_warning() -> None:
    random = np.random.default_rng(0)
    C = random.standard_normal((20, 20))
    C = (C + C.T) / 9.0
    np.fill_diagonal(C, 1.0)
    Z, residuals = follow(C, C)
    assert Z.shape == C.shape
    assert residuals.shape == (20,)


def test_a_warm_start_does_not_change_the_solution() -> None:
    C = cosines("conflict", 20)
    q = C.mean(axis=0) - 0.02
    cold, _ = solve_one(C, q)
    for passive in (cold > 0.0, np.ones(20, dtype=bool), np.arange(20) % 2 == 0):
        warm, residual = solve_one(C, q, passive)
        assert residual <= 1e-13
        np.testing.assert_allclose(warm, cold, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_many_references_equal_each_reference_alone(name: str) -> None:
    J = jacobian(name, 10)
    G = J @ J.T
    U = np.vstack([np.diag(np.full(10, 0.1)), np.full((1, 10), 0.1)])
    V = project(G, U)
    for u, v in zip(U, V, strict=True):
        [alone] = project(G, u[None])
        limit = 1e-6 if name == "neardup" else 1e-11
        assert np.linalg.norm((v - alone) @ J) <= limit * np.linalg.norm(np.abs(u) @ np.abs(J))


# -- against the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("m", [2, 3, 4, 6, 7, 12, 26])
def test_projections_equal_those_in_extended_precision(name: str, m: int) -> None:
    limit = 1e-7 if name == "neardup" else 1e-12
    for seed in range(2 if m <= 7 else 1):
        J = jacobian(name, m, 300, seed)
        U = np.diag(np.full(m, 1.0 / m))
        V = project(J @ J.T, U)
        error = (V - project_exactly(J, U)) @ J.astype(LD)
        scale = np.linalg.norm(J.mean(axis=0))
        assert float(np.sqrt((error.sum(axis=0) ** 2).sum())) <= limit * scale


@pytest.mark.parametrize("m", [2, 3, 5, 9])
def test_references_of_any_sign_equal_those_in_extended_precision(m: int) -> None:
    J = jacobian("gauss", m, 2 * m)
    U = np.random.default_rng(m).normal(size=(6, m))
    U[4] = np.abs(U[4])
    U[5] = -np.abs(U[5])
    V = project(J @ J.T, U)
    error = (V - project_exactly(J, U)) @ J.astype(LD)
    assert np.abs(error).max() <= 1e-12 * np.linalg.norm(U @ J)


# -- optimality, as a property ---------------------------------------------------------------------


@settings(max_examples=80)
@given(
    name=st.sampled_from(FAMILIES),
    m=st.integers(1, 30),
    n=st.integers(2, 60),
    seed=st.integers(0, 10_000),
    single=st.booleans(),
)
def test_the_conditions_of_optimality_hold(
    name: str, m: int, n: int, seed: int, single: bool
) -> None:
    if name == "neardup":  # fewer columns would make near-dependence of exact dependence
        n = max(n, m)
    J = jacobian(name, m, n, seed)
    G = J @ J.T
    U = np.full((1, m), 1.0 / m) if single else np.diag(np.full(m, 1.0 / m))
    V = project(G, U)
    assert (V >= U).all()
    C, norms, _ = equilibrate(G)
    scaled = U * norms
    scales = np.abs(scaled).max(axis=1, keepdims=True)
    scales[scales == 0.0] = 1.0
    Z = (V - U) * norms / scales
    assert lcp_residual(C, (scaled / scales) @ C, Z).max() <= 1e-10


@settings(max_examples=40)
@given(m=st.integers(2, 9), seed=st.integers(0, 1000), exponent=st.integers(-200, 200))
def test_the_scale_of_each_row_and_of_the_gramian_leaves_the_problem(
    m: int, seed: int, exponent: int
) -> None:
    J = jacobian("conflict", m, 40, seed)
    U = np.eye(m)
    powers = 2.0 ** np.random.default_rng(seed).integers(-20, 20, size=m)
    G = J @ J.T
    plain = project(G, U)
    # Row i scaled by r_i: v_i becomes v_i / r_i once u_i is scaled alike. Powers of two are exact.
    scaled = project(G * powers[:, None] * powers * 2.0**exponent, U / powers[None, :])
    np.testing.assert_allclose(scaled * powers, plain, rtol=1e-9, atol=1e-12)


# -- what is special -------------------------------------------------------------------------------


def test_zero_rows_keep_their_reference_exactly() -> None:
    J = jacobian("special", 8)
    U = np.random.default_rng(0).normal(size=(3, 8))
    V = project(J @ J.T, U)
    assert (V[:, 2] == U[:, 2]).all()
    two = project(np.array([[0.0, 0.0], [0.0, 4.0]]), np.array([[-1.0, -2.0]]))
    assert two.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_no_references_give_no_vectors(m: int) -> None:
    assert project(np.eye(m), np.zeros((0, m))).shape == (0, m)


@pytest.mark.parametrize("m", [2, 5, 12, 40])
def test_a_reference_below_zero_is_projected_onto_zero(m: int) -> None:
    J = jacobian("gauss", m)
    V = project(J @ J.T, -np.ones((2, m)))
    assert np.abs(V @ J).max() <= 1e-13 * np.abs(J).sum()


@pytest.mark.parametrize("m", [2, 6, 12, 100])
def test_a_single_reference_in_the_cone_is_its_own_projection(m: int) -> None:
    J = np.eye(m) + 0.01
    u = np.linspace(0.1, 1.0, m)[None]
    v = project(J @ J.T, u)
    assert np.array_equal(v, u)
    assert v is not u


@pytest.mark.parametrize("m", [2, 6, 12])
def test_the_arguments_are_not_modified(m: int) -> None:
    G = cosines("conflict", m)
    U = np.full((3, m), 0.5)
    before = G.copy(), U.copy()
    project(G, U)
    assert (before[0] == G).all()
    assert (before[1] == U).all()


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("name", ["lowdim", "special", "rankdef"])
@pytest.mark.parametrize("m", [6, 12, 20, 30])
def test_a_gramian_rounded_to_float32_is_made_semidefinite_again(
    name: str, m: int, seed: int
) -> None:
    J = jacobian(name, m, seed=seed)
    G = (J @ J.T).astype(np.float32).astype(np.float64)
    x = project(G, np.diag(np.full(m, 1.0 / m))).sum(axis=0) @ J
    norms = np.linalg.norm(J, axis=1)
    conflicts = (J @ x)[norms > 0] / norms[norms > 0]
    # Half of the digits of float32: G determines lengths only up to the root of its own error.
    assert conflicts.min() >= -1e-2 * np.linalg.norm(J.mean(axis=0))


def test_semidefinite_matrices_are_not_repaired() -> None:
    for name in FAMILIES:
        C = torch.from_numpy(cosines(name, 12))
        assert nearest_semidefinite(C) is C


def test_a_problem_that_cannot_be_solved_warns_with_its_residual_and_stays_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not even nearly a Gramian: every pair of nine unit vectors at an angle beyond 120 degrees.
    G = np.full((9, 9), -0.9) + 1.9 * np.eye(9)
    U = np.eye(9)
    # Without the repair, which would turn any symmetric matrix into a Gramian.
    monkeypatch.setattr(_dual_cone, "nearest_semidefinite", lambda C: C)
    with pytest.warns(UnsolvedWarning) as caught:
        V = NativeDualConeSolver()(G, U)
    [warning] = caught
    assert isinstance(warning.message, UnsolvedWarning)
    assert warning.message.problem == "dual_cone"
    assert warning.message.residual > 1e-10
    assert (V >= U).all()
    assert ((V @ G) * V).sum(axis=1).max() <= 1.0 + 1e-12


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_however_wrong_an_answer_is_it_is_no_longer_than_what_is_projected(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst that a solver could do: a combination that has nothing to do with the problem."""

    def wrong(C: torch.Tensor, Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.Generator().manual_seed(0)
        Z = size * torch.rand(Q.shape, dtype=Q.dtype, generator=numbers)
        return Z, torch.ones(len(Q), dtype=Q.dtype)

    monkeypatch.setattr(_dual_cone, "solve_lcps", wrong)
    monkeypatch.setattr(_dual_cone, "project_few", lambda gramian, references: None)
    J = jacobian("conflict", 12)
    G, U = J @ J.T, np.eye(12)
    with pytest.warns(UnsolvedWarning) as caught:
        V = NativeDualConeSolver()(G, U)
    assert (V >= U).all()
    assert (np.einsum("ij,jk,ik->i", V, G, V) <= G.diagonal() * (1.0 + 1e-12)).all()
    # The warning tells of the answer that is given, not of the one that the solver had found.
    told, norms = caught[0].message, np.sqrt(G.diagonal())
    assert isinstance(told, UnsolvedWarning)
    scaled = (V - U) * norms / norms[:, None]
    cosines = G / np.outer(norms, norms)
    assert told.residual == pytest.approx(lcp_residual(cosines, cosines, scaled).max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("m", [2, 6, 16, 33])
def test_no_family_warns(name: str, m: int) -> None:
    J = jacobian(name, m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project(J @ J.T, np.diag(np.full(m, 1.0 / m)))
        project(J @ J.T, np.full((1, m), 1.0 / m))


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_plain_floats_take_rows_of_any_length(name: str, m: int) -> None:
    C = cosines(name, m)
    lengths = np.array([1e-150, 1e150, 1e-20, 1.0, 3.0, 1e80])[:m]
    for q in (C[0], C[-1], -C @ np.linspace(0.5, 1.0, m)):
        unit = tiny(C, q)
        # With z = z' / lengths, the problem in z' has a unit diagonal; a vector of length 1e3 has a
        # thousand times the products.
        scaled = tiny(C * lengths[:, None] * lengths, 1e3 * q * lengths, 1e3)

        assert unit is not None
        assert scaled is not None
        np.testing.assert_allclose(scaled * lengths, 1e3 * unit, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_projections_of_three_rows_take_any_scale(scale: float) -> None:
    G = np.array([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 3.0]])
    np.testing.assert_allclose(project(scale * G, np.eye(3)), project(G, np.eye(3)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 8])
def test_few_rows_are_projected_as_any_number_of_rows(name: str, m: int) -> None:
    J = jacobian(name, m)
    mixed = np.where(np.arange(m) % 2, -0.5, 1.0)[None]
    for U in (np.eye(m), np.full((1, m), 1.0 / m), mixed, -np.eye(m), np.zeros((1, m))):
        few = project_few(J @ J.T, U)
        if few is None:
            assert name not in REGULAR
            continue
        assert (few >= U).all()
        largest = np.linalg.norm(U @ J, axis=1).max()
        general = NativeDualConeSolver().project(torch.from_numpy(J @ J.T), torch.from_numpy(U))
        difference = distance(J, few, general.numpy())
        assert difference <= (1e-6 if name == "neardup" else 1e-10) * largest
