from __future__ import annotations

import torch

from jdcore import get_aggregator, get_weighting

GRAMIAN = torch.eye(3, dtype=torch.float64)


def test_the_weights_are_the_softmax_of_normal_numbers() -> None:
    normal = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = normal.exp() / normal.exp().sum()

    weights = get_weighting("random", generator=torch.Generator().manual_seed(5))(GRAMIAN)

    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_weights_are_positive_sum_to_one_and_change_from_call_to_call() -> None:
    weighting = get_weighting("random", generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([weighting(GRAMIAN) for _ in range(400)])

    assert bool((drawn > 0).all())
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(400, dtype=torch.float64))
    assert len(drawn.unique(dim=0)) == 400
    # Exchangeable, so the mean is 1/3; the standard error of 400 draws is about 0.01.
    assert float((drawn.mean(dim=0) - 1 / 3).abs().max()) < 0.04


def test_without_a_generator_the_seed_of_torch_decides() -> None:
    aggregator = get_aggregator("random")
    matrix = torch.randn(3, 4)
    vectors = []
    for _ in range(2):
        torch.manual_seed(11)
        vectors.append(aggregator(matrix))

    assert torch.equal(*vectors)


def test_a_single_row_comes_back() -> None:
    assert get_aggregator("random")(torch.tensor([[3.0, -1.0]])).tolist() == [3.0, -1.0]
