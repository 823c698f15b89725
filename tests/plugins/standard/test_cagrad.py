import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jdcore
from jdcore.aggregation import CAGrad, CAGradWeighting, DualProj
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.testing import FAMILIES, family
from jdplugins.standard._solvers import _alone, _conflict_averse
from tests.plugins.standard.dependent_rows import KINDS

J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
LD = np.longdouble


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_one_row_is_worst_in_the_whole_ball(scale: float) -> None:
    # g0 = (1, 1, 1), radius sqrt(3)/2; going that far along (-4, 1, 1) does not yet reach the
    # vectors with equal inner products (those of first entry 0).
    along = math.sqrt(3) / 2 / math.sqrt(18)
    expected = torch.tensor([1 - 4 * along, 1 + along, 1 + along])
    update = CAGrad(c=0.5)(J * scale) / scale
    torch.testing.assert_close(update, expected, atol=3e-7, rtol=3e-7)


def test_both_rows_are_worst_in_a_large_ball() -> None:
    # Equal inner products need first entry 0: d = (0, 1 + t, 1 + t) with 1 + 2 t^2 = 4 * 3.
    t = math.sqrt(5.5)
    expected = torch.tensor([0.0, 1 + t, 1 + t], dtype=torch.float64)
    torch.testing.assert_close(CAGrad(c=2.0)(J.double()), expected)


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 3.0])
def test_orthonormal_rows_lengthen_the_mean(c: float) -> None:
    expected = torch.full((3,), (1 + c) / 3, dtype=torch.float64)
    torch.testing.assert_close(CAGrad(c=c)(torch.eye(3, dtype=torch.float64)), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_radius_zero_gives_the_mean(name: str) -> None:
    matrix = _matrix(name, 6, 50, 0)
    torch.testing.assert_close(CAGrad(c=0.0)(matrix), matrix.mean(0))


def test_at_a_stationary_point_the_mean_is_projected_if_the_ball_allows_it() -> None:
    # The dual cone is {x_0 = 0, x_1 >= 0}; g0 = (1/3, 1) is 1/3 away from it, |g0| = sqrt(10)/3.
    matrix = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    assert CAGrad(c=0.5)(matrix).tolist() == pytest.approx([0.0, 1.0], abs=1e-14)
    torch.testing.assert_close(CAGrad(c=0.5)(matrix), DualProj()(matrix))
    # A smaller ball does not reach the cone: go towards it as far as possible.
    radius = 0.2 * math.sqrt(10) / 3
    assert CAGrad(c=0.2)(matrix).tolist() == pytest.approx([1 / 3 - radius, 1.0], abs=1e-14)


def test_opposite_rows_give_the_mean_zero() -> None:
    matrix = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert CAGrad(c=0.5)(matrix).abs().max() <= 1e-7


def test_a_zero_row_takes_part_in_the_mean_only() -> None:
    # As for the other row alone, with g0 = (1, 0), except that a zero row has nothing to gain.
    matrix = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert CAGrad(c=0.5)(matrix).tolist() == pytest.approx([1.5, 0.0], abs=1e-15)


def _certificate(rows: np.ndarray, c: float) -> tuple[float, float]:
    """Duality gap relative to ``|g0| min |g_i|``, and the radius reached relative to ``|g0|``."""
    weights = CAGradWeighting(c=c)(torch.from_numpy(rows @ rows.T)).numpy()
    wide = rows.astype(LD)
    g0 = wide.mean(axis=0)
    length = np.sqrt(g0 @ g0)
    norms = np.sqrt((wide * wide).sum(axis=1))
    v = np.where(norms > 0, weights - LD(1) / len(rows), 0)
    assert v.min() >= -1e-15
    d = g0 + v @ wide
    radius = np.sqrt(((d - g0) ** 2).sum()) / length
    primal = (wide @ d)[norms > 0].min()
    if v.sum() <= 0:
        return max(0.0, float(-primal)), float(radius)
    share = v / v.sum()
    combined = share @ wide
    dual = combined @ g0 + c * length * np.sqrt(combined @ combined)
    if radius < c * (1 - 1e-6):  # stationary: the optimum is zero, and no row is hurt
        dual = LD(0)
    return float((dual - primal) / length / norms[norms > 0].min()), float(radius)


@settings(max_examples=100)
@given(
    name=st.sampled_from(["gauss", "conflict", "neardup", "rankdef", "lowdim", "special"]),
    m=st.integers(2, 30),
    c=st.sampled_from([0.2, 0.5, 0.9, 2.0]),
    seed=st.integers(0, 999),
)
def test_the_duality_gap_vanishes(name: str, m: int, c: float, seed: int) -> None:
    gap, radius = _certificate(_matrix(name, m, 200, seed).numpy(), c)
    assert gap <= (1e-9 if name == "neardup" else 3e-11)
    assert radius <= c * (1 + 1e-6)


@pytest.mark.parametrize("name", ["gauss", "conflict"])
def test_independent_rows_take_no_linear_complementarity_problem_where_they_are_many(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conflict_averse, "solve_one", None)
    gap, radius = _certificate(_matrix(name, 128, 300, 0).numpy(), 0.5)
    assert gap <= 3e-11
    assert radius == pytest.approx(0.5, rel=1e-9)


def test_a_level_starts_from_the_rows_that_are_active_at_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Gradient steps from there would take all of both rows of pairs that are nearly equal.
    solved: list[int] = []

    class Counted(_alone.ActiveSet):
        def solve(self, *arguments: np.ndarray) -> tuple[np.ndarray, float]:
            solved.append(len(arguments[0]))
            return super().solve(*arguments)

    monkeypatch.setattr(_alone, "ActiveSet", Counted)
    for seed in (1, 2):
        rows = KINDS["nearly equal"](64, np.random.default_rng(seed))
        CAGrad(c=0.5)(torch.from_numpy(rows).float())
    assert len(solved) <= 2


@pytest.mark.parametrize("c", [0.2, 1.0])
def test_rows_of_very_different_norms(c: float) -> None:
    for m in (2, 3, 5):
        rows = _matrix("badscale", m, 100, m).numpy()
        d = CAGrad(c=c)(torch.from_numpy(rows)).numpy()
        g0 = rows.mean(axis=0)
        assert np.linalg.norm(d - g0) == pytest.approx(c * np.linalg.norm(g0), rel=1e-12)


@pytest.mark.parametrize("m", [2, 12, 100])
def test_one_row_is_shorter_than_the_others_by_more_than_a_square_in_float64_holds(m: int) -> None:
    lengths = torch.linspace(1.0, 2.0, m, dtype=torch.float64) * 1e100
    lengths[0] = 1e-100

    update = CAGrad(c=0.5)(torch.diag(lengths))

    # All of the radius goes to the short row, which still gains least.
    mean = lengths / m
    mean[0] = 0.5 * mean[1:].norm()
    torch.testing.assert_close(update, mean, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("c", [0.3, 3.0])
@pytest.mark.parametrize("m", [3, 8, 12, 96])
def test_rows_of_all_lengths_that_float64_squares_leave_the_update_in_the_ball(
    m: int, c: float
) -> None:
    random = torch.Generator().manual_seed(m)
    for _ in range(8):
        rows = torch.randn((m, m), generator=random, dtype=torch.float64)
        exponents = 200.0 * torch.rand((m, 1), generator=random, dtype=torch.float64) - 100.0
        matrix = rows * 10.0**exponents
        update, mean = CAGrad(c=c)(matrix), matrix.mean(0)

        scale = mean.abs().max()
        distance, length = ((update - mean) / scale).norm(), (mean / scale).norm()
        assert distance <= c * length * (1.0 + 1e-6)


def test_a_stationary_point_is_told_from_one_that_nearly_is() -> None:
    # Zero is in the hull of three vectors at 120 degrees; lifted by 1e-5, all can be improved.
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    flat = torch.stack([angles.cos(), 2 * angles.sin(), torch.zeros(3).double()], dim=1)
    flat[0] *= 2
    lifted = flat + torch.tensor([0.0, 0.0, 1e-5], dtype=torch.float64)
    assert (flat @ CAGrad(c=1.5)(flat)).abs().max() <= 1e-12
    assert (lifted @ CAGrad(c=1.5)(lifted)).min() > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_warns(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m in (2, 4, 9, 33):
            CAGrad(c=0.4)(_matrix(name, m, 300, 0))


def test_its_direction_approaches_that_of_the_shortest_vector() -> None:
    matrix = _matrix("gauss", 4, 50, 0)
    far = CAGrad(c=1e6)(matrix)
    near = jdcore.get_aggregator("mgda")(matrix)
    torch.testing.assert_close(far / far.norm(), near / near.norm(), atol=1e-5, rtol=0.0)


def test_arguments() -> None:
    assert repr(CAGrad(c=0.5)) == "CAGrad(c=0.5, solver='native')"
    with pytest.raises(ParameterError, match=r"`c` must be >= 0.0 and finite, got -1.0\."):
        CAGrad(c=-1.0)
    with pytest.raises(ParameterTypeError):
        CAGrad(c="0.5")
    aggregator = CAGrad(c=0.5)
    aggregator.weighting.c = 0.0
    torch.testing.assert_close(aggregator(J), J.mean(0))


def _matrix(name: str, m: int, n: int, seed: int) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(1000 * seed + m))
