from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, get_aggregator
from jdcore.aggregation._columns import Columns


def by_hand(rows: Tensor, center: Tensor, tau: float, n_iter: int) -> Tensor:
    for _ in range(n_iter):
        offsets = rows - center
        factors = (tau / offsets.norm(dim=1)).clamp(max=1.0)
        center = center + (factors[:, None] * offsets).mean(0)
    return center


def test_rows_are_clipped_around_zero_at_first_and_around_the_update_then() -> None:
    rows = torch.tensor([[0.5], [0.7], [-100.0]], dtype=torch.float64)
    aggregator = get_aggregator("centered_clipping", tau=1.0)

    # (0.5 + 0.7 - 1) / 3, and 1/15 + (13/30 + 19/30 - 1) / 3.
    assert aggregator(rows).tolist() == pytest.approx([1 / 15])
    assert aggregator(rows).tolist() == pytest.approx([1 / 15 + 2 / 90])


def test_a_large_radius_gives_the_mean() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    aggregator = get_aggregator("centered_clipping")

    for _ in range(2):
        torch.testing.assert_close(aggregator(rows), rows.mean(0))


@pytest.mark.parametrize(("before", "after"), [(1.0, 1e-160), (1e200, 1.0), (1e160, 1e150)])
def test_the_center_may_be_longer_than_rows_by_more_than_has_a_square(
    before: float, after: float
) -> None:
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    aggregator = get_aggregator("centered_clipping", tau=0.1 * before)
    for _ in range(4):
        center = aggregator(rows * before)

    moved = aggregator(rows * after)

    # In units in which everything has a square.
    expected = by_hand(rows * (after / before), center / before, 0.1, 1)
    torch.testing.assert_close(moved / before, expected, rtol=1e-9, atol=1e-12)


def test_the_longest_block_of_the_center_gives_the_unit() -> None:
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together, by_blocks = (get_aggregator("centered_clipping", tau=1e199) for _ in range(2))
    for before in (1e200, 1e200, 1.0):
        blocks = [rows[:, :2] * before, rows[:, 2:]]
        moved, _ = by_blocks.aggregate_blocks(blocks)
        expected = together(torch.cat(blocks, dim=1))

    assert bool(expected.isfinite().all())
    torch.testing.assert_close(torch.cat(moved), expected)


@pytest.mark.parametrize("n_iter", [1, 3])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_steps_agree_with_those_on_the_rows_themselves(n_iter: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    aggregator = get_aggregator("centered_clipping", tau=3.0 * scale, n_iter=n_iter)
    center = torch.zeros(12, dtype=torch.float64)
    for _ in range(4):
        rows = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        rows[0] *= 50
        center = by_hand(rows, center, 3.0, n_iter)

        torch.testing.assert_close(aggregator(rows * scale) / scale, center)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_that_are_short_beside_the_center_add_up_in_half_precision(
    dtype: torch.dtype,
) -> None:
    aggregator = get_aggregator("centered_clipping", tau=1.0)
    for _ in range(600):
        vector = aggregator(torch.full((3, 1), 1000.0, dtype=dtype))

    assert vector.dtype == dtype
    assert vector.item() == 600.0


def test_blocks_share_the_radius() -> None:
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, parts = (get_aggregator("centered_clipping", tau=1.0) for _ in range(2))
    for _ in range(2):
        vectors, weights = parts.aggregate_blocks([rows[:, :5], rows[:, 5:]])

        torch.testing.assert_close(torch.cat(vectors), whole(rows))
        assert weights is None


def test_another_number_of_columns_needs_a_reset() -> None:
    aggregator = get_aggregator("centered_clipping")
    aggregator(torch.ones(3, 4))

    with pytest.raises(ParameterError, match=r"of 4 columns, as in the calls before, .*reset\(\)"):
        aggregator(torch.ones(3, 5))
    aggregator.reset()
    assert aggregator(torch.ones(3, 5)).shape == (5,)


def test_columns_on_several_processes_are_refused() -> None:
    class Elsewhere(Columns):
        pass

    with pytest.raises(ParameterError, match="no state of the size of a row"):
        get_aggregator("centered_clipping").aggregate_columns(Elsewhere([torch.ones(3, 4)]))


def test_the_last_update_does_not_change_with_what_the_caller_does_to_it() -> None:
    aggregator = get_aggregator("centered_clipping", tau=1.0)
    aggregator(torch.ones(3, 4)).zero_()

    torch.testing.assert_close(aggregator.center, torch.full((4,), 0.5))
