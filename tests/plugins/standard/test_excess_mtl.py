from __future__ import annotations

import math

import pytest
import torch

from jdcore import get_aggregator


def test_estimates_by_hand() -> None:
    # First |g|: 3 + 4 and 1. Then 9/√(9 + 9) + 0 and 4/√(1 + 4), relative to these.
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[3.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    aggregator = get_aggregator("excess_mtl", robust_step_size=0.5)

    torch.testing.assert_close(aggregator(first), first.mean(dim=0))

    growth = [math.exp(0.5 * 9 / math.sqrt(18) / 7), math.exp(0.5 * 4 / math.sqrt(5))]
    weights = torch.tensor(growth, dtype=torch.float64) / sum(growth)
    torch.testing.assert_close(aggregator(second), weights @ second)


def test_weights_are_equal_during_the_warm_up_whose_mean_is_the_baseline() -> None:
    aggregator = get_aggregator("excess_mtl", n_warmup_steps=2)
    matrix = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    for _ in range(2):
        torch.testing.assert_close(aggregator(matrix), matrix.mean(dim=0))
    # |g| and |g| / √2, of both rows alike.
    expected = torch.tensor([4.0, 1.0], dtype=torch.float64) * (1 + 1 / math.sqrt(2)) / 2
    torch.testing.assert_close(aggregator.baseline, expected)


def test_the_scales_of_the_rows_play_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 3, 10, generator=generator)
    factors = torch.tensor([[1e-25], [1.0], [1e25]])  # the squares leave the range of float32
    plain, stretched = get_aggregator("excess_mtl"), get_aggregator("excess_mtl")

    for matrix in matrices:
        plain(matrix)
        stretched(factors * matrix)

    torch.testing.assert_close(stretched.logarithms, plain.logarithms, rtol=1e-4, atol=1e-5)


def test_an_objective_that_starts_with_a_zero_row_waits_for_its_baseline() -> None:
    aggregator = get_aggregator("excess_mtl")
    silent = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    spoken = torch.tensor([[5.0, 0.0], [0.0, 1.0]])

    torch.testing.assert_close(aggregator(silent), silent.mean(dim=0))
    aggregator(spoken)
    assert aggregator.baseline.tolist() == [5.0, 1.0]
    vectors, weights = aggregator.aggregate_blocks([spoken])
    assert bool((weights > 0.1).all())
    torch.testing.assert_close(vectors[0], weights @ spoken)


def test_weights_of_another_library_after_a_warm_up() -> None:
    # Without one, the other library takes the first estimates as they are, not relative to
    # themselves.
    torchjd = pytest.importorskip("torchjd.aggregation")
    ours = get_aggregator("excess_mtl", n_warmup_steps=2, robust_step_size=0.7)
    theirs = torchjd.ExcessMTL(n_warmup_steps=2, robust_step_size=0.7)
    generator = torch.Generator().manual_seed(0)

    for _ in range(10):
        matrix = torch.randn(3, 10, generator=generator, dtype=torch.float64)
        # Its 1e-7 is far below the squares of all but a few entries.
        torch.testing.assert_close(ours(matrix), theirs(matrix), rtol=1e-4, atol=1e-5)


def test_sums_beyond_float64_weigh_as_much_as_it_holds() -> None:
    aggregator = get_aggregator("excess_mtl")
    rows = torch.tensor([[1e308, 1e308, 1e308], [1.0, 1.0, 1.0]], dtype=torch.float64)

    _, weights = aggregator.aggregate_blocks([rows])

    assert weights.tolist() == [0.5, 0.5]


def test_estimates_far_above_their_baseline_share_the_weight_of_the_largest() -> None:
    aggregator = get_aggregator("excess_mtl")
    rows = torch.eye(3, dtype=torch.float64)
    aggregator(rows * torch.tensor([1e-310, 1e-310, 1.0], dtype=torch.float64)[:, None])

    _, weights = aggregator.aggregate_blocks([rows])

    assert weights.tolist() == [0.5, 0.5, 0.0]
