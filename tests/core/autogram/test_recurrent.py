"""Recurrent layers: step by step in float64, an LSTM in float32 by the fused kernel of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from jdcore.autogram import Engine
from tests.core.autogram.oracle import check_engine, check_float32, default_dtype, randn

B, T = 5, 4
Make = Callable[[], nn.Module]


class _Sequence(nn.Module):
    def __init__(self, recurrent: nn.Module, only: str = "all") -> None:
        super().__init__()
        self.embed, self.recurrent, self.only = nn.Linear(6, 6), recurrent, only

    def forward(self, x: Tensor) -> Tensor:
        out, (state, cell) = self.recurrent(self.embed(x))
        parts = {
            "outputs": out.pow(2).sum(1)[:, :2],
            "last state": state.pow(3).sum(0)[:, :2],
            "last cell": cell.pow(2).sum(0)[:, :2],
        }
        return sum(parts.values()) if self.only == "all" else parts[self.only]


def _lstm(**options: Any) -> nn.Module:
    return _Sequence(nn.LSTM(6, 4, batch_first=True, **options))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.4},
]


# As many steps as samples, or a multiple of these, hide where the samples are.
@pytest.mark.parametrize(
    ("options", "steps"),
    [*((options, T) for options in OPTIONS), *((OPTIONS[3], steps) for steps in (1, B, 2 * B))],
)
def test_the_fused_kernel_is_served_in_closed_form(
    called: list[str], options: dict[str, Any], steps: int
) -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, steps, 6))

    check_float32(lambda: _lstm(**options), lambda m: losses(m).sum(1), 0)
    check_float32(lambda: _lstm(**options), losses, 0)
    assert called == []
    check_float32(lambda: _lstm(**options), lambda m: losses(m).mean(0), None)


@pytest.mark.parametrize("only", ["outputs", "last state", "last cell"])
def test_each_result_by_itself(called: list[str], only: str) -> None:
    def make() -> nn.Module:
        return _Sequence(nn.LSTM(6, 4, num_layers=2, batch_first=True), only)

    check_engine(make, lambda m: m(randn(B, T, 6)), 0)
    assert called == []


def test_frozen_weights_of_the_fused_kernel(called: list[str]) -> None:
    def make() -> nn.Module:
        model = _lstm(num_layers=2)
        model.recurrent.weight_hh_l0.requires_grad_(False)
        model.recurrent.bias_ih_l1.requires_grad_(False)
        return model

    check_float32(make, lambda m: m(randn(B, T, 6)).sum(1), 0)
    assert called == []


class _Twice(nn.Module):
    """One LSTM called twice, on time-first input, with a state that carries gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.lstm = nn.Linear(6, 4), nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x[:, 0])[None]
        steps = x.transpose(0, 1)
        out, state = self.lstm(steps, (start, start.sin()))
        again, _ = self.lstm(steps.flip(0), state)
        return out.pow(2).sum((0, 2)) + again.pow(3).sum((0, 2))


def test_a_recurrent_layer_called_again_with_its_state(called: list[str]) -> None:
    check_engine(_Twice, lambda m: m(randn(B, T, 6)), 0)
    assert called == []


class _Packed(nn.Module):
    def __init__(self, recurrent: nn.Module, sort: bool) -> None:
        super().__init__()
        self.embed, self.recurrent, self.sort = nn.Linear(6, 6), recurrent, sort

    def forward(self, x: Tensor) -> Tensor:
        lengths = [4, 3, 3, 1, 1] if self.sort else [1, 3, 4, 1, 3]
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=self.sort
        )
        out, state = self.recurrent(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        last = state[0] if isinstance(state, tuple) else state
        return padded.pow(2).sum(1)[:, :2] + last.pow(3).sum(0)[:, :2]


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: Callable[..., nn.Module], sort: bool) -> None:
    def make() -> nn.Module:
        return _Packed(kind(6, 4, num_layers=2, bidirectional=True, batch_first=True), sort)

    check_engine(make, lambda m: m(randn(B, T, 6)).sum(1), 0)
    check_engine(make, lambda m: m(randn(B, T, 6)), 0)
    check_engine(make, lambda m: m(randn(B, T, 6)).mean(0), None)


def test_samples_may_be_folded_with_sequences(called: list[str]) -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(3 * B, T, 6)).sum(1).view(B, 3).sum(1)

    check_float32(_lstm, losses, 0)
    assert called == []


def test_one_sample_and_sequences_without_a_batch() -> None:
    check_engine(_lstm, lambda m: m(randn(1, T, 6)).sum(1), 0)

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0].pow(2).sum(0)

    check_engine(Unbatched, lambda m: m(randn(T, 6)), None)
    check_engine(Unbatched, lambda m: m(randn(T, 6)).sum()[None], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_as_good_as_its_rounding(dtype: torch.dtype) -> None:
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model = _lstm(num_layers=2).to(dtype)
        engine = Engine(model, batch_dim=0)
        gramian = engine.compute_gramian(model(randn(B, T, 6).to(dtype)).sum(1))
        wide = model.float()
        engine = Engine(wide, batch_dim=0)
        expected = engine.compute_gramian(wide(randn(B, T, 6).to(dtype).float()).sum(1))
    assert float((gramian - expected).norm() / expected.norm()) < 3e-2
