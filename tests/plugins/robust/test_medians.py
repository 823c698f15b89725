from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jdcore import ParameterError, get_aggregator, get_weighting


def column(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)[:, None]


def pull(rows: Tensor, point: Tensor) -> tuple[Tensor, int]:
    """The sum of the unit vectors from a point to all rows elsewhere, and how many are there."""
    offsets = rows - point
    lengths = offsets.norm(dim=1)
    away = lengths > 1e-9 * rows.norm(dim=1).max()
    return (offsets[away] / lengths[away, None]).sum(0), int((~away).sum())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), half=st.integers(1, 6), away=st.integers(-3, 3))
def test_an_even_number_of_rows_on_a_line_has_its_median_in_the_middle(
    seed: int, half: int, away: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(2 * half, 1, generator=generator, dtype=torch.float64)
    direction, offset = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    rows = places * direction + 10.0**away * offset
    first, second = rows[places[:, 0].argsort()[half - 1 : half + 1]]

    vector = get_aggregator("geometric_median")(rows)

    torch.testing.assert_close(vector, 0.5 * (first + second), rtol=0, atol=1e-9)


def test_the_median_of_an_odd_number_is_the_middle_entry() -> None:
    rows = torch.tensor([[1.0, 9.0], [2.0, 5.0], [600.0, 4.0]])

    assert get_aggregator("coordinate_wise_median")(rows).tolist() == [2.0, 5.0]


def test_the_median_of_an_even_number_is_the_mean_of_the_two_middle_entries() -> None:
    assert get_aggregator("coordinate_wise_median")(column(1, 2, 5, 600)).tolist() == [3.5]


def test_two_huge_middle_entries_do_not_overflow() -> None:
    rows = torch.tensor([[3e38], [3e38]])

    assert get_aggregator("coordinate_wise_median")(rows).tolist() == rows[0].tolist()


def test_the_mean_around_the_median_leaves_out_the_farthest_entries() -> None:
    # The median is 4; the four entries closest to it are 4, 5, 2 and 1 (distances 0, 1, 2, 3).
    assert get_aggregator("meamed", n_byzantine=1)(column(1, 2, 4, 5, 100)).tolist() == [3.0]
    assert get_aggregator("meamed", n_byzantine=2)(
        column(1, 2, 4, 5, 100)
    ).tolist() == pytest.approx([11 / 3])


def test_of_entries_equally_far_from_the_median_the_smaller_one_is_kept() -> None:
    assert get_aggregator("meamed", n_byzantine=1)(column(-1, 0, 1)).tolist() == [-0.5]


def test_the_mean_around_the_median_needs_an_honest_majority() -> None:
    with pytest.raises(ParameterError, match=r"`matrix` .* at least 5 rows \(2 n_byzantine \+ 1\)"):
        get_aggregator("meamed", n_byzantine=2)(column(1, 2, 3, 4))


def test_the_geometric_median_of_a_quadrangle_is_where_its_diagonals_cross() -> None:
    rows = torch.tensor([[0.0, 0.0], [4.0, 4.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    rows[1] *= 250  # still on its diagonal

    torch.testing.assert_close(
        get_aggregator("geometric_median")(rows), torch.tensor([2.0, 2.0], dtype=torch.float64)
    )


def test_the_geometric_median_of_a_triangle_sees_its_sides_under_equal_angles() -> None:
    # Of the equilateral triangle the centre; of one with an angle above 120 degrees its corner.
    equilateral = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]).double()
    obtuse = torch.tensor([[0.0, 0.1], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)

    torch.testing.assert_close(get_aggregator("geometric_median")(equilateral), equilateral.mean(0))
    assert get_weighting("geometric_median")(obtuse @ obtuse.T).tolist() == [1.0, 0.0, 0.0]


def test_on_a_line_the_geometric_median_is_the_median() -> None:
    median = get_aggregator("geometric_median")

    assert median(column(5, 1, 2)).tolist() == [2.0]
    assert median(column(1, 8, 2, 4)).tolist() == [3.0]
    assert median(column(0, 0, 1, 2)).tolist() == [0.5]  # both middle positions count once
    torch.testing.assert_close(median(column(7, 7, 7)), torch.tensor([7.0]).double())


def test_a_row_that_coincides_with_others_counts_as_often() -> None:
    # Two rows in one place hold out against two others; a single one would be pulled away.
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    assert get_aggregator("geometric_median")(rows).tolist() == [0.0, 0.0]
    single, count = pull(rows[1:], get_aggregator("geometric_median")(rows[1:]))
    assert count == 0
    assert single.norm() < 1e-10


def test_a_row_that_just_fails_to_be_the_median_is_told_from_one_that_just_is() -> None:
    # Two rows at an angle of 120 degrees -/+ 1e-5 pull the third by one +/- 1e-5.
    for excess in (1e-5, -1e-5):
        angle = math.pi / 3 - excess
        x, y = math.cos(angle), math.sin(angle)
        rows = torch.tensor([[0.0, 0.0], [x, y], [x, -y]], dtype=torch.float64)
        vector = get_aggregator("geometric_median")(rows)

        if excess > 0:
            assert vector[0] > 1e-7
            assert pull(rows, vector)[0].norm() < 1e-8
        else:
            assert vector.tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 9),
    n=st.integers(1, 12),
    exponent=st.sampled_from([-30, 0, 30]),
    spread=st.sampled_from([0.0, 4.0, 12.0]),
)
def test_the_geometric_median_satisfies_its_optimality_condition(
    seed: int, m: int, n: int, exponent: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rows *= 10 ** (spread * torch.rand(m, 1, generator=generator, dtype=torch.float64))

    vector = get_aggregator("geometric_median")(rows * 10.0**exponent) / 10.0**exponent

    offsets = rows - vector
    lengths = offsets.norm(dim=1)
    resting = lengths <= 1e-9 * rows.norm(dim=1)
    force = (offsets[~resting] / lengths[~resting, None]).sum(0).norm()
    assert force <= resting.sum() + 1e-7 * m


def test_the_geometric_median_does_not_lose_digits_to_a_common_offset_of_narrow_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(7, 30, generator=generator)
    shifted = (rows + 1000.0) - 1000.0  # what float32 keeps

    with_offset = get_aggregator("geometric_median")((shifted + 1000.0).double()) - 1000.0
    without = get_aggregator("geometric_median")(shifted.double())

    assert (with_offset - without).abs().max() < 1e-8
