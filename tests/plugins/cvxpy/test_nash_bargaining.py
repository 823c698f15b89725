"""ECOS for NashMTL: against native, against known values, and where it fails."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import jdcore
from jdcore import ParameterError, ParameterTypeError, UnknownNameError, UnsolvedWarning
from jdcore.testing import family
from tests.plugins.distributions import needs

pytestmark = [needs("jdplugins-cvxpy"), needs("jdplugins-standard")]

Array = NDArray[np.float64]


def backend(name: str, **arguments: Any) -> Any:
    return jdcore.get_solver("nash_bargaining", name, **arguments)


def draw(name: str, m: int, n: int = 100) -> tuple[Array, Array]:
    J = family(name, m, n, generator=torch.Generator().manual_seed(m)).numpy()
    return J, J @ J.T


def residual(gramian: Array, alpha: Array) -> float:
    return float(np.abs(alpha * (gramian @ alpha) - 1.0).max())


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("name", ["gauss", "conflict"])
def test_it_agrees_with_native_where_rows_are_independent_and_of_one_order(
    name: str, m: int
) -> None:
    J, G = draw(name, m)

    alpha, native = backend("ecos")(G), backend("native")(G)

    assert residual(G, alpha) <= 1e-3
    # The length of both is √m.
    assert np.linalg.norm((alpha - native) @ J) <= 1e-4 * np.sqrt(m)


@pytest.mark.parametrize("m", [2, 8, 32])
def test_it_agrees_with_native_on_dependent_rows_that_have_a_solution(m: int) -> None:
    J, G = draw("rankdef", m)

    assert np.linalg.norm((backend("ecos")(G) - backend("native")(G)) @ J) <= 1e-4 * np.sqrt(m)


def test_orthogonal_rows_get_the_inverse_of_their_norms() -> None:
    # G is diagonal, so α_i² G_ii = 1.
    alpha = backend("ecos")(np.diag([4.0, 1.0, 0.25]))

    np.testing.assert_allclose(alpha, [0.5, 1.0, 2.0], rtol=1e-6)


def test_zero_rows_get_weight_zero() -> None:
    np.testing.assert_allclose(backend("ecos")(np.diag([4.0, 0.0])), [0.5, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(backend("ecos")(np.zeros((2, 2))), [0.0, 0.0])


@pytest.mark.parametrize("scale", [1e-100, 1e-10, 1e10, 1e100, 1e200])
def test_rows_that_are_longer_get_less(scale: float) -> None:
    _, G = draw("gauss", 4)

    np.testing.assert_allclose(
        backend("ecos")(G * scale) * np.sqrt(scale), backend("ecos")(G), rtol=1e-6
    )


def test_conflicting_rows_of_which_the_sum_conflicts_with_one_are_solved() -> None:
    # (G 1)_0 = 1 - 3 < 0: φ is not defined at the usual start α = 1.
    J = np.array([[1.0, 0.0], [-3.0, 1.0]])
    G = J @ J.T

    alpha = backend("ecos")(G)

    # By hand: G = [[1, -3], [-3, 10]]; α₀² - 3 α₀α₁ = 1 and 10 α₁² - 3 α₀α₁ = 1 give α₀ = √10 α₁
    # and α₁² = 1 / (10 - 3 √10).
    second = (10.0 - 3.0 * 10.0**0.5) ** -0.5
    np.testing.assert_allclose(alpha, [10.0**0.5 * second, second], rtol=1e-5)


# -- the procedure ---------------------------------------------------------------------------------


def test_the_number_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import ecos

    solve, solved = ecos.solve, []
    monkeypatch.setattr(ecos, "solve", lambda *a, **k: solved.append(a) or solve(*a, **k))
    _, G = draw("rankdef", 8)

    with pytest.warns(UnsolvedWarning, match="had not converged after 1 steps"):
        backend("ecos", max_iters=1, tolerance=1e-12)(G)
    assert len(solved) == 1

    solved.clear()
    backend("ecos")(G)
    assert 1 <= len(solved) <= 20


def test_the_answer_is_a_fixed_point_and_the_start_is_left_alone() -> None:
    _, G = draw("conflict", 8)
    first = backend("ecos")(G)
    start = first.copy()

    second = backend("ecos")(G, start)

    np.testing.assert_array_equal(start, first)
    np.testing.assert_allclose(second, first, rtol=1e-4)


def test_a_start_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import ecos

    solve, solved = ecos.solve, []
    monkeypatch.setattr(ecos, "solve", lambda *a, **k: solved.append(a) or solve(*a, **k))
    _, G = draw("rankdef", 8)
    solver = backend("ecos", tolerance=1e-6)
    alpha = solver(G)
    cold = len(solved)

    solver(G * 1.01, alpha)

    assert len(solved) - cold < cold


@pytest.mark.parametrize("start", [[0.0, 0.0], [-1.0, float("nan")], [1e-30, 1e30]])
def test_any_start_will_do(start: list[float]) -> None:
    alpha = backend("ecos")(np.diag([4.0, 1.0]), np.array(start))

    np.testing.assert_allclose(alpha, [0.5, 1.0], rtol=1e-3)


def test_the_method_starts_from_the_weights_of_its_previous_call() -> None:
    starts = []

    def recording(gramian: Array, start: Array | None, level: float) -> Array:
        starts.append(start)
        alpha: Array = backend("ecos")(gramian, start)
        return alpha

    method = jdcore.get_weighting("nash_mtl", solver=recording)
    gramian = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    for _ in range(2):
        method(gramian)
    method.reset()
    method(gramian)
    method(torch.eye(3))

    assert starts[0] is None
    np.testing.assert_array_equal(starts[1], backend("ecos")(gramian.numpy()))
    assert starts[2] is None  # after reset()
    assert starts[3] is None  # of another number of objectives


def test_the_weights_are_solved_for_at_every_kth_call() -> None:
    solved = []

    def counting(gramian: Array, start: Array | None, level: float) -> Array:
        solved.append(gramian)
        alpha: Array = backend("ecos")(gramian, start)
        return alpha

    method = jdcore.get_aggregator("nash_mtl", solver=counting, update_weights_every=3)
    for _ in range(7):
        method(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))

    assert len(solved) == 3


def test_a_saved_state_continues_with_the_same_start() -> None:
    first, second = (jdcore.get_aggregator("nash_mtl", solver="ecos") for _ in range(2))
    matrices = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    for matrix in matrices:
        first(matrix)
    second.load_state_dict(first.state_dict())

    assert torch.equal(first(matrices[0]), second(matrices[0]))


# -- failure ---------------------------------------------------------------------------------------


def test_a_stationary_point_is_a_warning_with_the_residual() -> None:
    G = np.array([[1.0, -1.0], [-1.0, 1.0]])  # opposite rows: α_i (G α)_i = 1 has no solution

    with pytest.warns(UnsolvedWarning, match="nash_bargaining") as caught:
        alpha = backend("ecos")(G)

    [warning] = caught
    assert isinstance(warning.message, UnsolvedWarning)
    assert warning.message.residual == pytest.approx(residual(G, alpha))
    assert "ECOS failed" in warning.message.reason
    assert np.isfinite(alpha).all()


def test_rows_of_very_different_norms_are_a_warning() -> None:
    _, G = draw("badscale", 4)

    with pytest.warns(UnsolvedWarning) as caught:
        alpha = backend("ecos")(G)

    assert np.isfinite(alpha).all()
    assert caught[0].message.residual > 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["badscale", "lowdim", "neardup"])
def test_the_fallback_takes_over_where_it_was_asked_for(name: str) -> None:
    _, G = draw(name, 4)

    alpha = backend("ecos", fallback="native")(G)

    np.testing.assert_array_equal(alpha, backend("native")(G))


# -- selection -------------------------------------------------------------------------------------


def test_native_stays_the_default() -> None:
    assert jdcore.get_aggregator("nash_mtl").weighting.solver == "native"
    assert jdcore.list_solvers("nash_bargaining")["nash_bargaining"] == ("ecos", "native")


def test_a_backend_is_selected_by_name_by_class_and_by_configuration() -> None:
    from jdcore.aggregation import NashMTL

    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    methods = [
        jdcore.get_aggregator("nash_mtl", solver="ecos"),
        NashMTL(solver="ecos"),
        jdcore.get_aggregator({"name": "nash_mtl", "solver": "jdplugins-cvxpy:ecos"}),
        jdcore.get_aggregator("nash_mtl", solver=backend("ecos", max_iters=5)),
    ]

    for method in methods:
        assert "ecos" in repr(method).lower()
        copy = pickle.loads(pickle.dumps(method))
        # The update of length √2 with equal inner products with the unit rows, cut to length 1.
        torch.testing.assert_close(copy(matrix), torch.full((2,), 0.5**0.5))


def test_a_variant_is_refused_as_ecos_has_none() -> None:
    with pytest.raises(UnknownNameError, match="ecos:fast"):
        jdcore.get_aggregator("nash_mtl", solver="ecos:fast")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_iters": 0}, ParameterError),
        ({"max_iters": 2.5}, ParameterTypeError),
        ({"tolerance": -1.0}, ParameterError),
        ({"fallback": "no_such_solver"}, UnknownNameError),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        backend("ecos", **arguments)
