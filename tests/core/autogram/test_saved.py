"""A torch that does not show what its operations saved: slower, and as right."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError
from jdcore.autogram import Engine, _open, _validation
from jdcore.autogram.rules import _direct, _fused_lstm
from jdcore.graph import _saved
from tests.core.autogram.oracle import check_engine, check_float32, randn

B, T, E = 5, 4, 8


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing can be read; what the generic rule had to serve is noted."""

    def unreadable(node: Any, name: str) -> Any:
        raise _saved.Unreadable(name)

    for module in (_direct, _fused_lstm, _validation):
        monkeypatch.setattr(module, "saved", unreadable)
    seen: list[str] = []
    for name in ("rows_of_call", "rows_of_losses"):
        original = getattr(_open, name)
        monkeypatch.setattr(_open, name, lambda *a, n=name, f=original: seen.append(n) or f(*a))
    return seen


class _Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, E), nn.Linear(E, 2)
        self.scale, self.shift = nn.Parameter(torch.rand(E) + 0.5), nn.Parameter(torch.randn(E))
        self.mixing = nn.Parameter(torch.randn(E, E))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) * self.scale / (self.scale + 2.0) - self.shift
        return self.out(torch.tanh(h @ self.mixing).sum(1))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, E)
        self.layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embed(x)).sum(1)


@pytest.mark.parametrize("make", [_Direct, _Recurrent, _Encoder])
def test_parameters_are_served_row_by_row(by_rows: list[str], make: type[nn.Module]) -> None:
    check_engine(make, lambda m: m(randn(B, T, 6)).pow(2).sum(1), 0)
    check_engine(make, lambda m: m(randn(B, T, 6)).pow(2)[:, :2], 0)
    assert by_rows


def test_the_fused_lstm_too(by_rows: list[str]) -> None:
    check_float32(_Recurrent, lambda m: m(randn(B, T, 6)).pow(2).sum(1), 0)
    assert by_rows


@pytest.mark.usefixtures("by_rows")
def test_a_batch_norm_of_unknown_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ParameterError, match="BatchNorm"):
        engine.compute_gramian(model(randn(B, 6)).sum(1))


def test_what_is_not_there_is_unreadable() -> None:
    product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
    assert _saved.saved(product.grad_fn, "mat2").shape == (2, 2)
    with pytest.raises(_saved.Unreadable, match="MmBackward0 does not show 'never'"):
        _saved.saved(product.grad_fn, "never")


def test_one_module_reads_what_operations_saved() -> None:
    from pathlib import Path

    package = Path(_saved.__file__).parents[1]
    readers = [
        p.name for p in package.rglob("*.py") if re.search(r'[."]_(raw_)?saved_', p.read_text())
    ]
    assert readers == ["_saved.py"]
