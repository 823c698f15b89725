from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.linalg import alignment_score, conflicting_share, cosines, gramian


def test_cosines_do_not_depend_on_the_lengths_of_the_gradients() -> None:
    # Angles of 0, 60 and 180 degrees to the first row.
    directions = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-1.0, 0.0]]).double()
    lengths = torch.tensor([[1e-150], [1.0], [1e150]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.5, -1.0], [0.5, 1.0, -0.5], [-1.0, -0.5, 1.0]]).double()

    torch.testing.assert_close(cosines(gramian(directions * lengths)), expected)


def test_a_zero_or_non_finite_gradient_has_no_angle_and_does_not_count() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [math.inf, 0.0]])
    product = gramian(rows)

    assert cosines(product).isnan().diagonal().tolist() == [False, True, False, True]
    assert conflicting_share(product) == 1.0
    assert alignment_score(product) == pytest.approx(-math.sqrt(0.5))


def test_the_share_counts_pairs_that_conflict_beyond_rounding() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1e-7, 1.0], [-1.0, -1.0]])

    assert conflicting_share(gramian(rows)) == pytest.approx(2 / 3)
    assert conflicting_share(gramian(rows), rounding=0.0) == 1.0


@pytest.mark.parametrize("m", [0, 1])
def test_there_is_no_share_without_a_pair(m: int) -> None:
    assert math.isnan(conflicting_share(torch.eye(m)))


def test_there_is_no_score_without_a_gradient() -> None:
    assert math.isnan(alignment_score(torch.zeros(2, 2)))


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_score_is_that_of_the_definition(m: int, seed: int) -> None:
    rows = torch.randn(m, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    units = rows / rows.norm(dim=1, keepdim=True)

    expected = 2 * units.mean(0).square().sum().item() - 1

    assert alignment_score(gramian(rows)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", [cosines, conflicting_share, alignment_score])
@pytest.mark.parametrize("gramian", [torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int64)])
def test_what_is_no_gramian_is_refused(
    measure: Callable[[Tensor], object], gramian: Tensor
) -> None:
    with pytest.raises(ParameterError, match="gramian"):
        measure(gramian)
