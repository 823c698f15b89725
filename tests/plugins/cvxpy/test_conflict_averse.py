"""cvxpy for CAGrad: against native, against a known value, and where it fails."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import jdcore
from jdcore import ParameterError, ParameterTypeError, UnknownNameError, UnsolvedWarning
from jdcore.testing import FAMILIES, family
from tests.plugins.distributions import needs

pytestmark = [needs("jdplugins-cvxpy"), needs("jdplugins-standard")]

Array = NDArray[np.float64]

# CLARABEL and SCS come with cvxpy, ECOS with the plugin; accuracy as stated in the docstring.
SOLVERS = {"cvxpy": 2e-5, "cvxpy:ECOS": 1e-4, "cvxpy:SCS": 1e-4}


def backend(name: str, **arguments: Any) -> Any:
    return jdcore.get_solver("conflict_averse", name, **arguments)


def draw(name: str, m: int, n: int = 60) -> tuple[Array, Array]:
    J = family(name, m, n, generator=torch.Generator().manual_seed(m)).numpy()
    return J, J @ J.T


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "neardup"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_agrees_with_native_on_well_posed_rows(
    solver: str, name: str, m: int, c: float
) -> None:
    J, G = draw(name, m)

    weights, native = backend(solver)(G, c), backend("native")(G, c)

    radius = c * np.linalg.norm(J.mean(axis=0))
    assert np.linalg.norm((weights - native) @ J) <= SOLVERS[solver] * radius
    assert (weights >= 1 / m - 1e-12 * np.abs(weights)).all()


@pytest.mark.parametrize("name", ["gauss", "conflict", "rankdef"])
def test_the_default_is_as_accurate_for_many_rows(name: str) -> None:
    J, G = draw(name, 32)

    difference = (backend("cvxpy")(G, 0.5) - backend("native")(G, 0.5)) @ J

    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(J.mean(axis=0))


@pytest.mark.parametrize("scale", [1e-100, 1e-15, 1.0, 1e15, 1e100])
def test_the_scale_of_the_rows_does_not_matter(scale: float) -> None:
    _, G = draw("gauss", 4)

    np.testing.assert_allclose(backend("cvxpy")(G * scale, 0.5), backend("cvxpy")(G, 0.5), 1e-5)


def test_the_best_worst_case_for_two_orthogonal_rows() -> None:
    # g0 = (1, 1/2), and the gains of d are 2 d_0 and d_1. In a ball of radius 0.9 |g0| it is best
    # to raise d_1 alone, which stays below 2 d_0. In one of 2 |g0| = √5 the gains get equal:
    # d = (1 + x, 2 + 2 x) with x² + (3/2 + 2 x)² = 5, so x = (√91 - 6) / 10.
    J = np.array([[2.0, 0.0], [0.0, 1.0]])
    x = (91.0**0.5 - 6.0) / 10.0

    narrow, wide = (backend("cvxpy")(J @ J.T, c) @ J for c in (0.9, 2.0))

    np.testing.assert_allclose(narrow, [1.0, 0.5 + 0.9 * 1.25**0.5], rtol=1e-6)
    np.testing.assert_allclose(wide, [1.0 + x, 2.0 + 2.0 * x], rtol=1e-5)


def test_at_a_stationary_point_the_closest_vector_without_conflict_is_taken() -> None:
    # The last two rows are opposite, so no gain exceeds zero: d must be orthogonal to them, and the
    # closest such vector to g0 = (1/3, 1/3) is (1/3, 0).
    J = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, -1.0]])

    np.testing.assert_allclose(backend("cvxpy")(J @ J.T, 0.9) @ J, [1 / 3, 0.0], atol=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.5])
@pytest.mark.parametrize(
    "gramian", [np.zeros((3, 3)), np.array([[1.0, -1.0], [-1.0, 1.0]]), np.array([[4.0]])]
)
def test_the_mean_where_the_ball_is_a_point_or_the_row_is_alone(gramian: Array, c: float) -> None:
    m = len(gramian)

    weights = backend("cvxpy")(gramian, c)

    np.testing.assert_allclose(weights, [1.0 + c if m == 1 else 1 / m] * m, rtol=1e-9)


def test_zero_rows_keep_the_weight_of_the_mean() -> None:
    J = np.array([[2.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])

    weights, native = (backend(s)(J @ J.T, 0.5) for s in ("cvxpy", "native"))

    assert weights[1] == 1 / 3
    np.testing.assert_allclose(weights @ J, native @ J, atol=1e-5)


# -- compiled programs -----------------------------------------------------------------------------


def test_a_program_is_compiled_once_per_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import cvxpy

    compiled = []
    problem = cvxpy.Problem

    def counted(*arguments: Any) -> Any:
        compiled.append(arguments)
        return problem(*arguments)

    monkeypatch.setattr(cvxpy, "Problem", counted)
    m = 11  # of which no other test has a program
    for seed in range(3):
        J = np.random.default_rng(seed).standard_normal((m, 20))
        jdcore.get_solver("conflict_averse", "cvxpy")(J @ J.T, 0.5)

    assert len(compiled) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_short_way_to_the_solver_changes_nothing(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jdplugins.cvxpy._programs import _PROGRAMS, Program, program

    gramians = [draw("gauss", 7)[1], draw("special", 7)[1], draw("badscale", 7)[1]]
    short = [backend(solver)(G, 0.5) for G in gramians]
    name = backend(solver).backend
    assert program(7, levels=True)._compiled[name] is not None

    # As where the parameters are not found in what cvxpy makes of the problem.
    monkeypatch.setattr(Program, "_compile", lambda *_: None)
    _PROGRAMS.program.cache_clear()
    long = [backend(solver)(G, 0.5) for G in gramians]
    assert program(7, levels=True)._compiled[name] is None
    _PROGRAMS.program.cache_clear()

    for one, other in zip(short, long, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_an_answer_does_not_depend_on_the_calls_before() -> None:
    (_, first), (_, second) = draw("gauss", 6), draw("conflict", 6)
    solve = backend("cvxpy")
    alone = solve(first, 0.5)

    solve(second, 0.9)

    np.testing.assert_array_equal(solve(first, 0.5), alone)


def test_threads_do_not_disturb_each_other() -> None:
    solve = backend("cvxpy")
    gramians = [draw("gauss", 5, n)[1] for n in (20, 30, 40)]
    expected = [solve(G, 0.5) for G in gramians]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not np.array_equal(solve(gramians[index], 0.5), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


# -- failure ---------------------------------------------------------------------------------------


def test_a_failure_is_a_warning_with_the_residual_and_no_other_solver() -> None:
    _, G = draw("gauss", 4)
    solver = backend("cvxpy", options={"max_iter": 1})

    with pytest.warns(UnsolvedWarning, match=r"cvxpy:CLARABEL failed \(.*\)") as caught:
        weights = solver(G, 0.5)

    [warning] = caught
    assert isinstance(warning.message, UnsolvedWarning)
    assert 0.0 < warning.message.residual < 10.0
    np.testing.assert_array_equal(weights, np.full(4, 0.25))


def test_an_option_that_the_solver_does_not_know_is_a_failure() -> None:
    _, G = draw("gauss", 4)

    with pytest.warns(UnsolvedWarning, match="no_such_option"):
        backend("cvxpy", options={"no_such_option": 1})(G, 0.5)


def test_an_inaccurate_answer_is_a_warning_with_the_residual() -> None:
    _, G = draw("gauss", 4)
    rough = {"tol_gap_abs": 0.1, "tol_gap_rel": 0.1, "tol_feas": 0.1}

    with pytest.warns(UnsolvedWarning, match="is too inaccurate on these rows") as caught:
        backend("cvxpy", options=rough)(G, 0.5)

    assert 1e-4 < caught[0].message.residual < 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"max_iter": 1}, {"no_such_option": 1}])
def test_the_fallback_takes_over_where_it_was_asked_for(options: dict[str, Any]) -> None:
    _, G = draw("gauss", 4)

    weights = backend("cvxpy", options=options, fallback="native")(G, 0.5)

    np.testing.assert_array_equal(weights, backend("native")(G, 0.5))


def test_near_duplicates_are_solved_or_the_residual_is_told() -> None:
    J, G = draw("neardup", 8)
    solver = backend("cvxpy", tolerance=1e-12)  # below what any conic solver reaches here

    with pytest.warns(UnsolvedWarning) as caught:
        weights = solver(G, 0.5)

    worst = (G @ weights / np.linalg.norm(J, axis=1)).min()
    best = (G @ backend("native")(G, 0.5) / np.linalg.norm(J, axis=1)).min()
    residual = caught[0].message.residual  # type: ignore[union-attr]
    assert best - worst <= residual * 0.5 * np.linalg.norm(J.mean(axis=0))


# -- selection -------------------------------------------------------------------------------------


def test_native_stays_the_default() -> None:
    assert jdcore.get_aggregator("cagrad", c=0.5).weighting.solver == "native"
    assert jdcore.list_solvers("conflict_averse")["conflict_averse"] == ("cvxpy", "native")


@pytest.mark.parametrize("solver", ["cvxpy", "cvxpy:clarabel", "jdplugins-cvxpy:cvxpy:CLARABEL"])
def test_a_backend_is_selected_by_name_by_class_and_by_configuration(solver: str) -> None:
    from jdcore.aggregation import CAGrad

    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    expected = jdcore.get_aggregator("cagrad", c=0.5)(matrix)
    methods = [
        jdcore.get_aggregator("cagrad", c=0.5, solver=solver),
        CAGrad(c=0.5, solver=solver),
        jdcore.get_aggregator({"name": "cagrad", "c": 0.5, "solver": solver}),
    ]

    for method in methods:
        assert repr(method) == f"CAGrad(c=0.5, solver={solver!r})"
        copy = pickle.loads(pickle.dumps(method))
        torch.testing.assert_close(copy(matrix), expected, rtol=1e-4, atol=1e-4)


def test_the_error_for_an_absent_backend_lists_those_that_are_installed() -> None:
    import cvxpy

    with pytest.raises(UnknownNameError) as caught:
        jdcore.get_aggregator("cagrad", c=0.5, solver="cvxpy:CLARABELLE")

    assert set(caught.value.known) == set(cvxpy.installed_solvers())
    assert caught.value.close[0] == "CLARABEL"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tolerance": -1.0}, ParameterError),
        ({"backend": 3}, ParameterTypeError),
        ({"fallback": "no_such_solver"}, UnknownNameError),
        ({"norm_eps": 1e-4}, ParameterTypeError),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        backend("cvxpy", **arguments)
