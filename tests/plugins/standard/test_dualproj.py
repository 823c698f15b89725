import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jdcore
from jdcore.aggregation import DualProj, DualProjWeighting, UPGrad
from jdcore.errors import UnknownNameError
from jdcore.testing import FAMILIES, family
from tests.plugins.standard.oracle import LD, project_exactly

J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_mean_is_turned_away_from_the_row_it_hurts(scale: float) -> None:
    # The mean (1, 1, 1) has inner product -2 with g0, |g0|^2 = 18: add g0 / 9.
    expected = torch.tensor([5.0, 10.0, 10.0]) / 9.0
    torch.testing.assert_close(DualProj()(J * scale) / scale, expected)


@pytest.mark.parametrize("r", [1e2, 1e3, 1e6])
def test_a_long_row_against_a_short_one(r: float) -> None:
    # The mean ((r - 1)/2, 1/2) has inner product -(r - 2)/2 with (-1, 1) of squared norm 2.
    update = DualProj()(torch.tensor([[r, 0.0], [-1.0, 1.0]], dtype=torch.float64))
    assert update.tolist() == pytest.approx([r / 4, r / 4], rel=1e-13)


@pytest.mark.parametrize("m", [2, 5, 12])
def test_rows_whose_squares_vanish_beside_the_others_are_left_alone(m: int) -> None:
    matrix = torch.eye(m, dtype=torch.float64) * 1e140
    matrix[0] = -1e-140

    expected = matrix.mean(0)
    torch.testing.assert_close(DualProj()(matrix), expected)
    torch.testing.assert_close(UPGrad()(matrix), expected)


def test_opposite_rows_give_zero_only_along_their_line() -> None:
    matrix = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    assert DualProj()(matrix).tolist() == pytest.approx([0.0, 1.0], abs=1e-7)


def test_preferences_choose_the_vector_that_is_projected() -> None:
    update = DualProj(pref_vector=torch.tensor([1.0, 0.0]))(J)
    torch.testing.assert_close(update, J[0] + 22 / 38 * J[1])


def test_without_conflict_it_is_the_weighted_sum() -> None:
    preferences = torch.tensor([1.0, 2.0, 3.0])
    matrix = torch.eye(3) + 0.1
    torch.testing.assert_close(DualProj(pref_vector=preferences)(matrix), preferences @ matrix)


@settings(max_examples=60)
@given(name=st.sampled_from(FAMILIES), m=st.integers(2, 24), seed=st.integers(0, 99))
def test_it_equals_the_projection_in_extended_precision(name: str, m: int, seed: int) -> None:
    matrix = family(name, m, 200, generator=torch.Generator().manual_seed(1000 * seed + m))
    weights = DualProjWeighting()(matrix @ matrix.T)
    assert (weights >= 1.0 / m).all()
    rows = matrix.numpy()
    exact = project_exactly(rows, np.full((1, m), 1.0 / m))[0] @ rows.astype(LD)
    error = weights.numpy() @ rows.astype(LD) - exact
    # Blocks of a random mixing of few rows may have a condition of 1e5 and more.
    limit = {"neardup": 1e-7, "rankdef": 1e-9}.get(name, 2e-11)
    assert float(np.sqrt((error**2).sum())) <= limit * np.linalg.norm(rows.mean(axis=0))


def test_a_single_task_preference_equals_its_share_of_upgrad() -> None:
    matrix = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    one = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(DualProj(pref_vector=one)(matrix), UPGrad(pref_vector=one)(matrix))


def test_arguments() -> None:
    assert repr(DualProj()) == "DualProj(pref_vector=None, solver='native')"
    assert isinstance(jdcore.get_aggregator("dualproj"), DualProj)
    with pytest.raises(UnknownNameError):
        DualProj(solver="frank_wolfe")


@pytest.mark.parametrize(("m", "seed"), [(45, 148), (56, 192), (60, 420), (53, 604)])
def test_rows_that_are_nearly_dependent_are_projected_exactly(m: int, seed: int) -> None:
    """Interior-point steps stall on their way from afar; a warning would be an error here."""
    rows = family("neardup", m, m // 2, generator=torch.Generator().manual_seed(seed))
    update = DualProj()(rows)
    assert float((rows @ update / rows.norm(dim=1)).min()) >= -1e-4 * float(rows.mean(0).norm())
