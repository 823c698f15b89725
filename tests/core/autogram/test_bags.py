"""Sums and means over rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from jdcore.autogram import Engine
from tests.core.autogram.oracle import check_engine, randn

B = 5
INDICES = torch.tensor([1, 2, 3, 4, 4, 0, 1, 8, 8, 2, 5])
UNEVEN = torch.tensor([0, 2, 2, 5, 9])
"""Bags of 2, none, 3, 4 and 2 entries."""


class _Bags(nn.Module):
    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 3, mode=mode, **options)
        self.last = nn.Linear(3, 2)


def _even(model: Any) -> Tensor:
    return model.table(INDICES[:10].view(B, 2))


def _uneven(model: Any) -> Tensor:
    return model.table(INDICES, UNEVEN)


def _with_last_offset(model: Any) -> Tensor:
    offsets = torch.cat([UNEVEN, torch.tensor([len(INDICES)])])
    weight = model.table.weight
    mode = model.table.mode
    return functional.embedding_bag(INDICES, weight, offsets, mode=mode, include_last_offset=True)


def _two_bags_for_a_sample(model: Any) -> Tensor:
    offsets = torch.tensor([0, 1, 3, 3, 4, 6, 7, 7, 9, 10])
    return model.table(INDICES, offsets).view(B, 2, 3).sin().sum(1)


def _bags_in_another_order(model: Any) -> Tensor:
    return model.table(INDICES, UNEVEN)[torch.tensor([3, 0, 4, 1, 2])]


def _weighted(model: Any) -> Tensor:
    return model.table(INDICES, UNEVEN, per_sample_weights=randn(len(INDICES)))


WAYS = [_even, _uneven, _with_last_offset, _two_bags_for_a_sample, _bags_in_another_order]
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "samples": (lambda y: y.square().sum(1), 0),
    "tasks": (torch.square, 0),
    "whole": (lambda y: y.square().mean(0), None),
}


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_bags_are_served_in_closed_form(
    way: Callable[[Any], Tensor], mode: str, options: dict[str, Any], kind: str
) -> None:
    losses, batch_dim = KINDS[kind]
    check_engine(lambda: _Bags(mode, **options), lambda m: losses(m.last(way(m).tanh())), batch_dim)


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_bags_are_served_in_closed_form(kind: str) -> None:
    losses, batch_dim = KINDS[kind]
    check_engine(lambda: _Bags("sum"), lambda m: losses(m.last(_weighted(m).tanh())), batch_dim)


class _WithFactors(_Bags):
    def __init__(self) -> None:
        super().__init__("sum")
        self.factors = nn.Parameter(torch.randn(len(INDICES)))


def test_largest_rows_frequencies_and_factors_that_are_parameters_are_called(
    called: list[str],
) -> None:
    def squares(model: Any) -> Tensor:
        return model.last(_uneven(model).tanh()).square().sum(1)

    def with_factors(model: Any) -> Tensor:
        bags = model.table(INDICES, UNEVEN, per_sample_weights=model.factors)
        return model.last(bags.tanh()).square().sum(1)

    check_engine(lambda: _Bags("max"), squares, 0)
    check_engine(lambda: _Bags("mean", scale_grad_by_freq=True), squares, 0)
    check_engine(_WithFactors, with_factors, 0)
    assert set(called) == {"EmbeddingBagBackward0"}


def test_factors_that_belong_to_samples_are_differentiated_through() -> None:
    class Model(_Bags):
        def __init__(self) -> None:
            super().__init__("sum")
            self.gate = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            factors = self.gate(x).flatten()
            offsets = torch.arange(0, 2 * B, 2)
            return self.last(self.table(INDICES[: 2 * B], offsets, per_sample_weights=factors))

    check_engine(Model, lambda m: m(randn(B, 2)).square().sum(1), 0)


def test_other_offsets_are_seen_at_every_call() -> None:
    model = _Bags("sum").double()
    engine = Engine(model, batch_dim=0)
    for offsets in ([0, 2, 2, 5, 9], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]):
        losses = model.last(model.table(INDICES, torch.tensor(offsets))).square().sum(1)
        assert engine.verify(losses).worst < 1e-12
