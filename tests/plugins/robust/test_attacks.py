"""What every robust method promises while the adversaries are a minority."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jdcore
from jdcore import AggregatorSpec, Property, get_aggregator
from jdcore._discovery import AGGREGATOR
from jdcore._registry import registry
from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.testing import ConformanceError, checks_of
from jdcore.testing._properties import withstands_an_adversary
from tests.plugins.robust.attacks import ATTACKS, Attack, far_away, inner_product

# Makers for f adversaries. Bucketing by two spoils up to 2 f of the buckets' rows: see its test.
METHODS: dict[str, Any] = {
    "coordinate_wise_median": lambda f: get_aggregator("coordinate_wise_median"),
    "geometric_median": lambda f: get_aggregator("geometric_median"),
    "multi_krum": lambda f: get_aggregator("multi_krum", n_byzantine=f),
    "mda": lambda f: get_aggregator("mda", n_byzantine=f),
    "meamed": lambda f: get_aggregator("meamed", n_byzantine=f),
    "monna": lambda f: get_aggregator("monna", n_byzantine=f, trusted=0),
    "smea": lambda f: get_aggregator("smea", n_byzantine=f),
    "caf": lambda f: get_aggregator("caf", n_byzantine=f),
    "nnm": lambda f: get_aggregator(
        "nnm", aggregator=get_aggregator("geometric_median"), n_byzantine=f
    ),
    "arc": lambda f: get_aggregator(
        "arc", aggregator=get_aggregator("coordinate_wise_median"), n_byzantine=f
    ),
    "bucketing": lambda f: get_aggregator(
        "bucketing",
        aggregator=get_aggregator("geometric_median"),
        bucket_size=2 if f == 2 else 1,
        generator=torch.Generator().manual_seed(0),
    ),
}


def honest_rows(seed: int, count: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = 5.0 * torch.randn(20, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    return centre + spread * noise


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("f", [2, 4])
def test_the_update_stays_near_the_mean_of_the_honest_rows(
    name: str, attack: Attack, f: int
) -> None:
    honest = honest_rows(0, 11 - f)
    rows = torch.cat([honest, attack(honest, f)])
    spread = (honest - honest.mean(0)).norm(dim=1).square().mean().sqrt()

    error = METHODS[name](f)(rows) - honest.mean(0)

    # The coefficient of the geometric median, the largest among the methods that the paper treats:
    # 4 (1 + f / (m - 2 f))^2, https://arxiv.org/pdf/2302.01772, table 1.
    assert error.norm() <= (2.0 * (1.0 + f / (11 - 2 * f))) * spread


@pytest.mark.parametrize("attack", [far_away, inner_product], ids=lambda attack: attack.__name__)
def test_the_mean_does_not_withstand_these_attacks(attack: Attack) -> None:
    honest = honest_rows(0, 9)
    vector = torch.cat([honest, attack(honest, 2)]).mean(0)

    assert vector @ honest.mean(0) < 0 or vector.norm() > 1e9


@pytest.mark.parametrize("name", METHODS)
def test_no_adversary_however_far_moves_the_update_out_of_the_honest_ball(name: str) -> None:
    honest = honest_rows(3, 9)
    centre, radius = honest.mean(0), (honest - honest.mean(0)).norm(dim=1).max()
    for size in (1e3, 1e8, 1e15, 1e30):
        rows = torch.cat([honest, -size * centre.expand(2, -1)])

        assert (METHODS[name](2)(rows) - centre).norm() <= 2.0 * radius


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    f=st.integers(0, 3),
    extra=st.integers(1, 4),
    size=st.sampled_from([0.1, 1.0, 10.0, 1e6]),
)
@pytest.mark.parametrize("name", ["coordinate_wise_median", "geometric_median"])
def test_medians_are_robust_with_the_published_coefficient(
    name: str, seed: int, f: int, extra: int, size: float
) -> None:
    m = 2 * f + extra
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 6, generator=generator, dtype=torch.float64)
    rows[:f] *= size
    honest = rows[f:]
    variance = (honest - honest.mean(0)).norm(dim=1).square().mean()
    coefficient = 4.0 * (1.0 + f / (m - 2 * f)) ** 2

    error = (get_aggregator(name)(rows) - honest.mean(0)).norm().square()

    assert error <= coefficient * variance * (1 + 1e-9)


def test_centered_clipping_follows_the_honest_rows_over_time() -> None:
    honest = honest_rows(5, 9)
    aggregator = get_aggregator("centered_clipping", tau=10.0)
    for _ in range(60):
        vector = aggregator(torch.cat([honest, -1e6 * honest.mean(0).expand(2, -1)]))

    # Two rows of eleven, clipped to 10, hold the nine honest ones off by 2 * 10 / 9.
    assert (vector - honest.mean(0)).norm() <= 20.0 / 9.0 + 1e-6


@define(eq=False)
class PlainMean(CoordinatewiseAggregator):
    def compute(self, columns: Tensor) -> Tensor:
        return columns.mean(0)


def test_the_kit_finds_methods_that_claim_to_withstand_an_adversary() -> None:
    jdcore.register(
        AggregatorSpec(
            name="plain_mean",
            summary="Mean.",
            aggregator=f"{__name__}:PlainMean",
            properties=(Property.ROBUST,),
            api_version=1,
        )
    )
    try:
        [check] = [c for c in checks_of("plain_mean") if c.check is withstands_an_adversary]
        with pytest.raises(ConformanceError, match=r"an adversary at .* moves it by"):
            check.run()
    finally:
        registry._runtime[AGGREGATOR].pop("plain_mean")
        jdcore.refresh()


def test_the_honest_mean_is_kept_where_nobody_attacks() -> None:
    honest = honest_rows(7, 9)

    for name in ("multi_krum", "mda", "meamed", "monna", "smea", "caf"):
        torch.testing.assert_close(METHODS[name](0)(honest), honest.mean(0))
