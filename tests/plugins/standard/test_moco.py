from __future__ import annotations

import math

import pytest
import torch

from jdcore import ParameterError, get_aggregator


def test_two_calls_by_hand() -> None:
    # Y = J/2, so Y Yᵀ = diag(1, 1/4), λ - γ Y Yᵀ λ = (1/2 - γ/2, 1/2 - γ/8); then Y = 3/4 J.
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    aggregator = get_aggregator("moco", beta=0.5, gamma=0.8)
    gap = 0.8 * (1 / 2 - 1 / 8)
    first = 1 / (1 + math.exp(gap))
    weights = torch.tensor([first, 1 - first], dtype=torch.float64)

    torch.testing.assert_close(aggregator(matrix), weights @ (matrix / 2))

    gap = weights[1] - weights[0] + 0.8 * (9 / 4 * weights[0] - 9 / 16 * weights[1])
    second = 1 / (1 + torch.exp(gap))
    weights = torch.stack([second, 1 - second])
    torch.testing.assert_close(aggregator(matrix), weights @ (0.75 * matrix))


def test_the_projection_of_the_paper_goes_to_the_shortest_combination() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    aggregator = get_aggregator("moco", beta=1.0, gamma=0.01, onto="projection")

    for _ in range(2000):
        vector = aggregator(matrix)

    torch.testing.assert_close(vector, get_aggregator("mgda")(matrix), rtol=1e-6, atol=1e-8)


def test_tracked_rows_average_the_noise_out() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    aggregator = get_aggregator("moco", beta=1.0, beta_sigma=1.0, gamma=0.0)
    seen = [truth + torch.randn(2, 2, generator=generator).double() for _ in range(50)]

    for matrix in seen:
        vector = aggregator(matrix)

    # Rates of 1/k make the plain mean.
    torch.testing.assert_close(aggregator.history, torch.stack(seen).mean(dim=0))
    torch.testing.assert_close(vector, torch.stack(seen).mean(dim=0).mean(dim=0))


def test_the_step_of_the_weights_may_decay() -> None:
    steady, decaying = (get_aggregator("moco", gamma_sigma=sigma) for sigma in (0.0, 2.0))
    matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]])

    assert torch.equal(steady(matrix), decaying(matrix))
    assert not torch.equal(steady(matrix), decaying(matrix))


def test_rows_far_out_of_range_decide_as_they_would_in_it() -> None:
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64) * 1e200

    vector = get_aggregator("moco", beta=1.0, onto="projection")(matrix)

    torch.testing.assert_close(vector, matrix[1])


def test_another_shape_is_refused_until_a_reset_and_changes_nothing() -> None:
    aggregator = get_aggregator("moco")
    aggregator(torch.ones(2, 3))
    before = repr(aggregator.state_dict())

    for shape in ((2, 4), (3, 3)):
        with pytest.raises(ParameterError, match=r"of shape \[2, 3\], as in the calls before"):
            aggregator(torch.ones(shape))
    assert repr(aggregator.state_dict()) == before
    aggregator.reset()
    aggregator(torch.ones(3, 4))


def test_blocks_of_several_dtypes_keep_them() -> None:
    aggregator = get_aggregator("moco", gamma=0.0)
    blocks = [torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 2), torch.ones(2, 0)]

    vectors, weights = aggregator.aggregate_blocks(blocks)

    assert [v.dtype for v in vectors] == [torch.float16, torch.float32, torch.float32]
    assert [v.tolist() for v in vectors] == [[0.5] * 3, [0.5] * 2, []]
    assert weights is None


@pytest.mark.parametrize("exponent", [1e300, 10**18])
def test_rates_that_decay_at_once_are_zero_from_the_second_call_on(exponent: float) -> None:
    aggregator = get_aggregator("moco", beta_sigma=exponent, gamma_sigma=exponent)
    first = aggregator(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    history = aggregator.history

    aggregator(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))

    assert first.tolist() != [0.0, 0.0]
    assert torch.equal(aggregator.history, history)
