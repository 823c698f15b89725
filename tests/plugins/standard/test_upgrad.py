import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jdcore
from jdcore.aggregation import UPGrad, UPGradWeighting
from jdcore.errors import ParameterError, ParameterTypeError, UnknownNameError
from jdcore.testing import FAMILIES, family

J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_two_conflicting_rows_at_any_scale(scale: float) -> None:
    # g0 g1 = -22, |g0|^2 = 18, |g1|^2 = 38: the mean of g0 + 22/38 g1 and g1 + 22/18 g0.
    first = 0.5 * (-4 + 22 / 38 * 6 + 6 - 22 / 18 * 4)
    other = 0.5 * (2 + 22 / 38 + 22 / 18)
    expected = torch.tensor([first, other, other])
    torch.testing.assert_close(UPGrad()(J * scale) / scale, expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("r", [1e2, 1e3, 1e6, 1e12])
def test_a_long_row_against_a_short_one(r: float) -> None:
    # Projections (r/2, r/2) of (r, 0), and (0, 1) of (-1, 1).
    update = UPGrad()(torch.tensor([[r, 0.0], [-1.0, 1.0]], dtype=torch.float64))
    assert update.tolist() == pytest.approx([r / 4, r / 4 + 0.5], rel=1e-15)


def test_nearly_opposite_rows_of_different_lengths_in_float64() -> None:
    # (1e6, 0) has inner product -1e6 with (-1, 1e-3), which projects it to about (1, 1e3), the
    # other one to (0, 1e-3).
    update = UPGrad()(torch.tensor([[1e6, 0.0], [-1.0, 1e-3]], dtype=torch.float64))
    assert update.tolist() == pytest.approx([0.5, 500.0], rel=1e-5)


def test_three_rows_of_which_two_take_the_conflict_away() -> None:
    # g0 + t (g1 + g2) is orthogonal to g1 and g2 for t = 1/3: (1/3, 1/3, 1/3). Adding g0 to g1
    # and g2 gives (0, 1, 0) and (0, 0, 1), which conflict with nothing.
    matrix = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    expected = torch.tensor([1 / 3, 4 / 3, 4 / 3]) / 3
    torch.testing.assert_close(UPGrad()(matrix), expected)


def test_rows_without_conflict_are_averaged() -> None:
    matrix = torch.eye(3) + 0.1
    torch.testing.assert_close(UPGrad()(matrix), matrix.mean(0))


def test_preferences_weigh_the_projections() -> None:
    # Only g0 + 22/38 g1 is left.
    update = UPGrad(pref_vector=torch.tensor([1.0, 0.0]))(J)
    torch.testing.assert_close(update, J[0] + 22 / 38 * J[1])


@settings(max_examples=30)
@given(name=st.sampled_from(FAMILIES), m=st.integers(2, 30), seed=st.integers(0, 99))
def test_a_negative_preference_seeks_nothing(name: str, m: int, seed: int) -> None:
    # Zero is the vector of the dual cone closest to -g_i: |x + g_i| >= |g_i| if x g_i >= 0.
    matrix = _matrix(name, m, seed)
    preferences = torch.ones(m, dtype=torch.float64)
    preferences[::2] = 0.0
    expected = UPGrad(pref_vector=preferences)(matrix)
    preferences[::2] = -2.0
    error = UPGrad(pref_vector=preferences)(matrix) - expected
    limit = 1e-6 if name == "neardup" else 1e-10
    assert error.norm() <= limit * matrix.norm()


@settings(max_examples=60)
@given(name=st.sampled_from(FAMILIES), m=st.integers(2, 30), seed=st.integers(0, 99))
def test_no_row_is_hurt_and_no_weight_falls_below_its_preference(
    name: str, m: int, seed: int
) -> None:
    matrix = _matrix(name, m, seed)
    weights = UPGradWeighting()(matrix @ matrix.T)
    assert (weights >= 1.0 / m).all()
    norms = matrix.norm(dim=1)
    inner = (matrix @ (weights @ matrix))[norms > 0] / norms[norms > 0]
    limit = 1e-9 if name == "neardup" else 1e-12
    assert inner.min() >= -limit * matrix.mean(0).norm()


def test_solvers_by_name_and_by_object_agree() -> None:
    solver = jdcore.get_solver("dual_cone", "native")
    assert torch.equal(UPGrad(solver=solver)(J), UPGrad(solver="native")(J))


def test_the_solver_is_called_with_one_reference_per_row() -> None:
    seen = []

    def doubling(gramian: object, references: Tensor) -> Tensor:
        seen.append((gramian, references))
        return 2.0 * references

    update = UPGrad(pref_vector=torch.tensor([1.0, -3.0]), solver=doubling)(J)
    assert seen[0][1].tolist() == [[1.0, 0.0], [0.0, -3.0]]
    torch.testing.assert_close(update, 2.0 * J[0] - 6.0 * J[1])


def test_an_unknown_solver_is_refused_at_construction_and_on_set() -> None:
    with pytest.raises(UnknownNameError, match=r"No dual_cone solver .*'simplex'.*native"):
        UPGradWeighting(solver="simplex")
    weighting = UPGradWeighting()
    with pytest.raises(UnknownNameError):
        weighting.solver = "simplex"
    with pytest.raises(ParameterTypeError, match="`solver` must be the name of a dual_cone"):
        weighting.solver = 3
    assert weighting.solver == "native"


def test_arguments_are_shown_and_pickled_by_name() -> None:
    assert repr(UPGrad()) == "UPGrad(pref_vector=None, solver='native')"
    copy = pickle.loads(pickle.dumps(UPGrad()))
    assert copy.weighting.solver == "native"
    assert torch.equal(copy(J), UPGrad()(J))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_both_precisions_do_not_warn(name: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m in (2, 5, 9, 28):
            UPGrad()(_matrix(name, m, 0, 500).to(dtype))


def _matrix(name: str, m: int, seed: int, n: int = 200) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(1000 * seed + m))


def test_the_order_of_few_nearly_opposite_rows_does_not_matter() -> None:
    # Their weights are 1e4, so that what is small beside them decides.
    rows = family("neardup", 5, 40, generator=torch.Generator().manual_seed(5))[:, :3]
    update = UPGrad()(rows)
    for seed in range(6):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(UPGrad()(rows[order]), update, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_what_rows_of_float64_have_beside_a_common_one_is_not_taken_for_rounding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)[:, None]
    own = torch.randn(10, 20, generator=generator, dtype=torch.float64)
    rows = signs * torch.ones(10, 20, dtype=torch.float64) + 2e-6 * own

    update = UPGrad()(rows)

    # By what is beside the common part: its squares, 4e-12, are far above rounding.
    assert (rows @ update).min() > 0.0


@pytest.mark.parametrize(
    "answer",
    [
        lambda references: references[0],
        lambda references: references[:2],
        lambda references: references.float(),
        lambda references: references.numpy(),
        lambda references: None,
    ],
)
def test_what_a_solver_answers_on_a_device_is_checked(answer: Any) -> None:
    class Solver:
        def __call__(self, gramian: Any, references: Any) -> Any:
            return references

        def project(self, gramian: Tensor, references: Tensor) -> Any:
            return answer(references)

    weighting = UPGradWeighting(solver=Solver())
    with pytest.raises(ParameterError, match=r"whose `project` answers a float64 .* \[3, 3\]"):
        weighting.compute_there(torch.eye(3, dtype=torch.float64))
