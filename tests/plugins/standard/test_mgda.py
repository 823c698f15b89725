import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jdcore
from jdcore.aggregation import MGDA, MGDAWeighting
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.testing import family

WELL_SCALED = ("gauss", "conflict", "neardup", "rankdef", "lowdim")


def _weights(matrix: list[list[float]], **arguments: object) -> list[float]:
    J = torch.tensor(matrix, dtype=torch.float64)
    weights: list[float] = MGDAWeighting(**arguments)(J @ J.T).tolist()
    return weights


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_point_between_two_rows_closest_to_zero(scale: float) -> None:
    # g0 + t (g1 - g0) = (-4 + 10 t, 1, 1) is shortest at t = 2/5.
    J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]) * scale
    expected = torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(MGDA()(J) / scale, expected, atol=3e-7, rtol=0.0)


def test_orthogonal_rows_weigh_by_the_inverse_squares_of_their_norms() -> None:
    assert _weights([[3.0, 0.0], [0.0, 4.0]]) == pytest.approx([16 / 25, 9 / 25], abs=1e-15)
    third = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    assert _weights(third) == pytest.approx([36 / 49, 9 / 49, 4 / 49], abs=1e-15)


def test_a_short_row_that_the_others_support_is_the_answer() -> None:
    assert _weights([[1.0, 0.0], [5.0, 1.0]]) == [1.0, 0.0]
    assert _weights([[5.0, 1.0], [1.0, 0.0], [4.0, -3.0]]) == pytest.approx([0, 1, 0], abs=1e-15)


def test_zero_in_the_hull_is_found() -> None:
    weights = _weights([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert weights == pytest.approx([1 / 2, 1 / 4, 1 / 4], abs=1e-14)


def test_zero_rows_share_all_the_weight() -> None:
    assert _weights([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]) == [0.5, 0.0, 0.5]


def test_equal_rows_share_the_weight() -> None:
    assert _weights([[1.0, 2.0], [1.0, 2.0]]) == [0.5, 0.5]


@settings(max_examples=100)
@given(
    name=st.sampled_from(WELL_SCALED),
    m=st.integers(2, 40),
    n=st.integers(2, 100),
    seed=st.integers(0, 999),
)
def test_the_certificate_of_the_shortest_vector(name: str, m: int, n: int, seed: int) -> None:
    # |x - x*|^2 <= x x - min_i g_i x, which only rounding keeps from zero.
    rows = _matrix(name, m, n, seed).numpy()
    weights = MGDAWeighting()(torch.from_numpy(rows @ rows.T)).numpy()
    assert weights.min() >= 0.0
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    wide = rows.astype(np.longdouble)
    x = weights @ wide
    shortest = np.linalg.norm(rows, axis=1).min()
    # Where rows differ in length, the rounding of x counts times the longest; where they nearly
    # are dependent, that of the Gramian is amplified.
    spread = np.linalg.norm(rows, axis=1).max() / shortest
    limit = 1e-11 if name == "neardup" else 1e-14
    assert float(x @ x - (wide @ x).min()) <= limit * spread * shortest**2


@settings(max_examples=40)
@given(m=st.integers(2, 12), seed=st.integers(0, 99))
def test_rows_of_very_different_norms(m: int, seed: int) -> None:
    rows = _matrix("badscale", m, 100, seed)
    x = MGDA()(rows)
    norms = rows.norm(dim=1)
    # The shortest vector is about as long as the shortest row, and opposes none.
    assert 0.1 * norms.min() <= x.norm() <= norms.min() * (1 + 1e-12)
    assert ((rows @ x) / norms).min() >= -1e-12 * norms.min()


def test_frank_wolfe_takes_the_published_steps() -> None:
    # From (1/2, 1/2): products are (5, 11), so it moves to row 0 by (8 - 5) / (8 - 5 + 13 - 5).
    # |g0|^2 = 13, g0 g1 = -3, |g1|^2 = 25.
    solver = jdcore.get_solver("min_norm", "frank_wolfe", max_iters=1)
    weights = solver(np.array([[13.0, -3.0], [-3.0, 25.0]]))
    step = 3 / 11
    assert weights.tolist() == pytest.approx([(1 - step) / 2 + step, (1 - step) / 2], abs=1e-15)


def test_frank_wolfe_is_exact_for_two_rows_and_approximate_for_more() -> None:
    rows = _matrix("conflict", 6, 50, 0)
    exact, approximate = MGDA()(rows), MGDA(solver="frank_wolfe")(rows)
    assert exact.norm() < 0.9 * approximate.norm()
    pair = _matrix("gauss", 2, 50, 0)
    torch.testing.assert_close(MGDA(solver="frank_wolfe")(pair), MGDA()(pair))


def test_frank_wolfe_converges_with_more_steps() -> None:
    rows = _matrix("gauss", 5, 50, 0)
    solver = jdcore.get_solver("min_norm", "frank_wolfe", epsilon=0.0, max_iters=20_000)
    torch.testing.assert_close(MGDA(solver=solver)(rows), MGDA()(rows), atol=2e-2, rtol=0.0)


def test_frank_wolfe_validates_its_arguments() -> None:
    with pytest.raises(ParameterError, match="`epsilon` must be >= 0"):
        jdcore.get_solver("min_norm", "frank_wolfe", epsilon=-1.0)
    with pytest.raises(ParameterError, match="`max_iters` must be >= 1"):
        jdcore.get_solver("min_norm", "frank_wolfe", max_iters=0)
    with pytest.raises(ParameterTypeError, match="`steps`"):
        jdcore.get_solver("min_norm", "frank_wolfe", steps=3)


def test_arguments_are_shown() -> None:
    assert repr(MGDA()) == "MGDA(solver='native')"
    assert repr(MGDA(solver="frank_wolfe")) == "MGDA(solver='frank_wolfe')"


def _matrix(name: str, m: int, n: int, seed: int) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(1000 * seed + m))
