from __future__ import annotations

import pytest
import torch

from jdcore import get_aggregator, get_weighting


def draw(m: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 30, generator=generator, dtype=torch.float64)


def test_one_step_by_hand() -> None:
    # A is divided by ((2 + 1) / 2)² = 9/4. The step is .1 A (w + .5 w̃), w + .5 w̃ = (3/4, 3/4):
    # (.5, .5) - .1 (4/3, 1/3), then the projection adds (1 - 5/6) / 2 to both.
    cross = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weighting = get_weighting("sdmgrad", lr=0.1, n_iter=1, lambda_=0.5)

    weights = weighting(cross)

    inner = torch.tensor([0.5 - 2 / 15, 0.5 - 1 / 30], dtype=torch.float64) + 1 / 12
    torch.testing.assert_close(weighting.weights, inner)
    torch.testing.assert_close(weights, (inner + 0.25) / 1.5)


def test_momentum_adds_half_of_the_step_before() -> None:
    # A is (1, 2) / 1.457, by its mean root; w̃ plays no part.
    cross = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    one = get_weighting("sdmgrad", lr=0.01, momentum=0.0, n_iter=2, lambda_=0.0)
    two = get_weighting("sdmgrad", lr=0.01, momentum=0.5, n_iter=2, lambda_=0.0)

    # Without projection at work, steps are the gradients less their mean: d, then d' + d / 2.
    a = torch.tensor([1.0, 4.0]).double() / 2.25
    first = 0.01 * (a * 0.5 - (a * 0.5).mean())
    w = 0.5 - first
    second = 0.01 * (a * w - (a * w).mean())
    torch.testing.assert_close(one(cross), w - second)
    torch.testing.assert_close(two(cross), w - second - first / 2)


def test_a_preference_moves_the_update_towards_it() -> None:
    preferred = get_weighting("sdmgrad", pref_vector=torch.tensor([1.0, 0.0]), lambda_=9.0)

    weights = preferred(torch.eye(2))

    assert weights[0] >= 0.9
    assert weights.sum() == pytest.approx(1.0)


def test_without_a_positive_diagonal_entry_weights_stay() -> None:
    weighting = get_weighting("sdmgrad", lambda_=0.0)
    weighting(torch.diag(torch.tensor([1.0, 9.0])))
    before = weighting.weights.clone()

    weights = weighting(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))

    torch.testing.assert_close(weights.double(), before, rtol=1e-6, atol=0)


def test_the_scale_of_the_losses_plays_no_part() -> None:
    one, two = draw(3, 0), draw(3, 1)
    for scale in (1e-180, 1e-3, 1e180):
        expected, found = get_aggregator("sdmgrad"), get_aggregator("sdmgrad")
        torch.testing.assert_close(
            found(one * scale, second=two * scale), expected(one, second=two) * scale
        )


def test_weights_of_another_library() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    preference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    arguments = {"lr": 0.3, "momentum": 0.4, "n_iter": 7, "lambda_": 0.6}
    ours = get_weighting("sdmgrad", pref_vector=preference, **arguments)
    theirs = torchjd.SDMGradWeighting(pref_vector=preference, **arguments)

    for seed in range(20):
        # Its diagonal, of some 100, is far from the 1e-8 that the other adds to it.
        cross = draw(3, seed) @ (draw(3, seed) + 0.5 * draw(3, seed + 100)).T
        torch.testing.assert_close(ours(cross), theirs(cross), rtol=1e-6, atol=1e-8)
