"""The dual-cone backends against native, against known values, and where they fail."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import jdcore
from jdcore import ParameterError, ParameterTypeError, UnknownNameError, UnsolvedWarning
from jdcore.linalg import equilibrate, lcp_residual
from jdcore.testing import FAMILIES, family
from tests.plugins.distributions import needs

pytestmark = [needs("jdplugins-quadprog"), needs("jdplugins-standard")]

Array = NDArray[np.float64]

# Those that the plugin depends on, and others where they are installed.
ALWAYS = ("quadprog", "qpsolvers", "qpsolvers:quadprog")
OPTIONAL = tuple(f"qpsolvers:{n}" for n in ("clarabel", "daqp", "highs", "osqp", "proxqp", "scs"))


def backend(name: str, **arguments: Any) -> Any:
    if name in OPTIONAL:
        qpsolvers = pytest.importorskip("qpsolvers")
        if name.partition(":")[2] not in qpsolvers.available_solvers:
            pytest.skip(f"{name.partition(':')[2]} is not installed")
    return jdcore.get_solver("dual_cone", name, **arguments)


def draw(name: str, m: int, n: int = 40) -> tuple[Array, Array]:
    J = family(name, m, n, generator=torch.Generator().manual_seed(m)).numpy()
    return J, J @ J.T


def residual(gramian: Array, references: Array, v: Array) -> float:
    """Natural residual of the LCP that v solves, as the docstrings of the solvers define it."""
    C, norms, _ = equilibrate(gramian)
    scales = np.abs(references * norms).max(axis=1, keepdims=True)
    scales[scales == 0.0] = 1.0
    Z = (v - references) * norms / scales
    return float(lcp_residual(C, references * norms / scales @ C, Z).max())


# -- agreement -------------------------------------------------------------------------------------


def disagreement(J: Array, references: Array, solver: str) -> float:
    """Largest distance of a projection from native's, relative to what is projected."""
    v, native = (backend(s)(J @ J.T, references) for s in (solver, "native"))
    assert (v >= references).all()
    sizes = np.linalg.norm(references @ J, axis=1)
    return float((np.linalg.norm((v - native) @ J, axis=1) / np.where(sizes > 0, sizes, 1)).max())


@pytest.mark.parametrize("m", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "neardup"])
@pytest.mark.parametrize("solver", [*ALWAYS, *OPTIONAL])
# osqp announces a change of its interface, at which qpsolvers calls it.
@pytest.mark.filterwarnings("ignore:The default value of raise_error:PendingDeprecationWarning")
def test_every_backend_agrees_with_native_on_well_posed_rows(
    solver: str, name: str, m: int
) -> None:
    J, G = draw(name, m)
    references = np.eye(m) / m

    assert disagreement(J, references, solver) <= 1e-10
    assert residual(G, references, backend(solver)(G, references)) <= 1e-13


@pytest.mark.parametrize("m", [2, 3, 8, 24])
@pytest.mark.parametrize("solver", ALWAYS)
def test_active_set_backends_agree_with_native_on_near_duplicates(solver: str, m: int) -> None:
    J, G = draw("neardup", m)
    references = np.eye(m) / m

    # Rows at an angle of 1e-4 magnify the rounding of the Gramian by 1e8.
    assert disagreement(J, references, solver) <= 1e-6
    assert residual(G, references, backend(solver)(G, references)) <= 1e-10


@pytest.mark.parametrize("m", [2, 3, 8, 24])
@pytest.mark.parametrize("solver", OPTIONAL)
@pytest.mark.filterwarnings("ignore:The default value of raise_error:PendingDeprecationWarning")
def test_other_backends_solve_near_duplicates_or_tell_the_residual(solver: str, m: int) -> None:
    _, G = draw("neardup", m)
    references = np.eye(m) / m

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnsolvedWarning)
        v = backend(solver)(G, references)

    left = residual(G, references, v)
    told = [w.message.residual for w in caught if isinstance(w.message, UnsolvedWarning)]
    # What is told is measured before v is rounded, and z is up to 1e4 here.
    assert left <= 1e-10 if not told else told == pytest.approx([left], rel=0.1)


@pytest.mark.parametrize("name", ["conflict", "rankdef", "special"])
@pytest.mark.parametrize("solver", ["quadprog", "qpsolvers"])
def test_the_backends_are_as_accurate_for_many_rows(solver: str, name: str) -> None:
    _, G = draw(name, 64, 100)
    references = np.eye(64)[:12]

    assert residual(G, references, backend(solver)(G, references)) <= 1e-13


@given(
    m=st.integers(1, 7),
    k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    exponent=st.integers(0, 8),
)
@settings(deadline=None)  # the first call imports the solver
def test_a_projection_conflicts_with_no_row_and_lies_above_its_reference(
    m: int, k: int, seed: int, exponent: int
) -> None:
    random = np.random.default_rng(seed)
    J = random.standard_normal((m, m + 1)) * 10.0 ** random.uniform(-exponent, exponent, (m, 1))
    references = random.standard_normal((k, m))

    v = jdcore.get_solver("dual_cone", "quadprog")(J @ J.T, references)

    assert (v >= references).all()
    x = v @ J
    norms = np.linalg.norm(J, axis=1)
    size = np.abs(references * norms).max(axis=1)
    assert (x @ J.T / norms >= -1e-10 * size[:, None]).all()
    assert (
        np.abs((v - references) * norms * (x @ J.T / norms)).max(axis=1) <= 1e-9 * size**2
    ).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("solver", ALWAYS)
def test_the_scale_of_the_rows_goes_through(solver: str, scale: float) -> None:
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]) * scale

    result = jdcore.get_aggregator("upgrad", solver=solver)(matrix)

    # By hand: each row minus its part along the other, averaged.
    expected = torch.tensor([0.2923977, 1.9005848, 1.9005848]) * scale
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("solver", ALWAYS)
def test_zero_rows_keep_their_reference(solver: str) -> None:
    J = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    references = np.array([[1.0, 5.0, 0.0], [0.0, -2.0, 0.0]])

    v = backend(solver)(J @ J.T, references)

    # The first row is projected onto the complement of the third: (1, 0) -> (1/2, 1/2).
    np.testing.assert_allclose(v, [[1.0, 5.0, 0.5], [0.0, -2.0, 0.0]], atol=1e-14)


def test_dualproj_takes_the_same_backends() -> None:
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

    results = [jdcore.get_aggregator("dualproj", solver=s)(matrix) for s in ("native", *ALWAYS)]

    # The mean (1, 1, 1) minus its part along the first row, -2 / 18 of it.
    expected = torch.tensor([1.0 - 8 / 18, 1.0 + 2 / 18, 1.0 + 2 / 18])
    for result in results:
        torch.testing.assert_close(result, expected)


# -- failure ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """quadprog gives up on every problem, with the error of the real one for a singular matrix."""
    import qpsolvers
    import quadprog

    def fail(*_: object, **__: object) -> None:
        raise ValueError("matrix G is not positive definite")

    monkeypatch.setattr(quadprog, "solve_qp", fail)
    monkeypatch.setattr(qpsolvers, "solve_qp", fail)


J2 = np.array([[1.0, 0.0], [-1.0, 1.0]])


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("solver", ["quadprog", "qpsolvers:quadprog"])
def test_a_failure_is_a_warning_with_the_residual_and_no_other_solver(solver: str) -> None:
    with pytest.warns(UnsolvedWarning, match="matrix G is not positive definite") as caught:
        v = backend(solver)(J2 @ J2.T, np.eye(2))

    # z = 0 leaves y = q: -1/√2 for the first row, whose cosine with the second that is, and for the
    # second row, which is longer by √2 but measured relative to its own length.
    [warning] = caught
    assert isinstance(warning.message, UnsolvedWarning)
    assert warning.message.residual == pytest.approx(0.5**0.5)
    assert warning.message.problem == "dual_cone"
    assert f"{solver} failed" in warning.message.reason
    np.testing.assert_array_equal(v, np.eye(2))


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("solver", ["quadprog", "qpsolvers:quadprog"])
def test_the_fallback_takes_over_where_it_was_asked_for(solver: str) -> None:
    v = backend(solver, fallback="native")(J2 @ J2.T, np.eye(2))

    np.testing.assert_array_equal(v, backend("native")(J2 @ J2.T, np.eye(2)))


@pytest.mark.usefixtures("broken")
def test_rows_without_a_conflict_need_no_solver() -> None:
    G = np.array([[1.0, 0.5], [0.5, 1.0]])

    np.testing.assert_array_equal(backend("quadprog")(G, np.eye(2)), np.eye(2))


def test_an_answer_above_the_tolerance_is_a_warning_or_falls_back() -> None:
    _, G = draw("gauss", 8)
    references = np.eye(8)
    strict = backend("quadprog", tolerance=0.0)

    with pytest.warns(UnsolvedWarning, match="quadprog is too inaccurate on these rows"):
        v = strict(G, references)
    np.testing.assert_allclose(v, backend("native")(G, references), atol=1e-12)

    v = backend("quadprog", tolerance=0.0, fallback="native")(G, references)
    np.testing.assert_array_equal(v, backend("native")(G, references))


def test_a_backend_that_stops_early_says_so() -> None:
    solver = backend("qpsolvers:osqp", options={"max_iter": 1})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver(J2 @ J2.T, np.eye(2))

    [ours] = [w.message for w in caught if isinstance(w.message, UnsolvedWarning)]
    assert "qpsolvers:osqp failed (no answer within its limits)" in str(ours)


def test_the_options_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import qpsolvers

    solve, seen = qpsolvers.solve_qp, []
    monkeypatch.setattr(qpsolvers, "solve_qp", lambda *a, **k: seen.append(k) or solve(*a, **k))
    backend("qpsolvers:quadprog", options={"verbose": False})(J2 @ J2.T, np.eye(2))

    assert [(k["solver"], k["verbose"]) for k in seen] == [("quadprog", False)] * 2


# -- selection -------------------------------------------------------------------------------------


def test_the_listing_shows_the_backends_beside_native() -> None:
    assert {"native", "qpsolvers", "quadprog"} <= set(jdcore.list_solvers("dual_cone")["dual_cone"])


def test_native_stays_the_default() -> None:
    assert jdcore.get_aggregator("upgrad").weighting.solver == "native"
    assert jdcore.get_aggregator("dualproj").weighting.solver == "native"


@pytest.mark.parametrize(
    "solver", [*ALWAYS, "jdplugins-quadprog:quadprog", "jdplugins-quadprog:qpsolvers:quadprog"]
)
def test_a_backend_is_selected_by_name_by_class_and_by_configuration(solver: str) -> None:
    from jdcore.aggregation import UPGrad

    methods = [
        jdcore.get_aggregator("upgrad", solver=solver),
        UPGrad(solver=solver),
        jdcore.get_aggregator({"name": "upgrad", "solver": solver}),
    ]

    for method in methods:
        assert repr(method) == f"UPGrad(pref_vector=None, solver={solver!r})"
        assert jdcore.to_config(method) == {"name": "upgrad", "solver": solver}
        assert repr(pickle.loads(pickle.dumps(method))) == repr(method)


def test_a_backend_with_arguments_is_selected_as_an_object() -> None:
    solver = backend("qpsolvers", fallback="native")
    method = jdcore.get_aggregator("upgrad", solver=solver)
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

    assert "fallback='native'" in repr(method)
    copy = pickle.loads(pickle.dumps(method))
    assert copy.weighting.solver == solver
    assert torch.equal(copy(matrix), method(matrix))


def test_the_error_for_an_absent_backend_lists_those_that_are_installed() -> None:
    import qpsolvers

    with pytest.raises(UnknownNameError) as caught:
        jdcore.get_aggregator("upgrad", solver="qpsolvers:no_such_solver")

    assert set(caught.value.known) == set(qpsolvers.available_solvers)
    assert "quadprog" in str(caught.value)
    assert caught.value.hint is None


def test_the_error_for_a_known_but_absent_backend_says_how_to_install_it() -> None:
    import qpsolvers

    if "gurobi" in qpsolvers.available_solvers:
        pytest.skip("gurobi is installed")
    with pytest.raises(UnknownNameError, match=r"pip install 'qpsolvers\[gurobi\]'"):
        jdcore.get_solver("dual_cone", "qpsolvers:gurobi")


def test_a_refused_backend_leaves_the_one_in_place() -> None:
    method = jdcore.get_aggregator("upgrad", solver="quadprog")

    with pytest.raises(UnknownNameError):
        method.weighting.solver = "qpsolvers:no_such_solver"

    assert method.weighting.solver == "quadprog"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tolerance": -1.0}, ParameterError),
        ({"tolerance": "small"}, ParameterTypeError),
        ({"fallback": "no_such_solver"}, UnknownNameError),
        ({"fallback": 3}, ParameterTypeError),
        ({"reg_eps": 1e-4}, ParameterTypeError),
    ],
)
@pytest.mark.parametrize("solver", ["quadprog", "qpsolvers"])
def test_unusable_arguments_are_refused(
    solver: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        jdcore.get_solver("dual_cone", solver, **arguments)
