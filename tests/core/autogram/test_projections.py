"""Layers whose parameters enter through matrix products somewhere inside of their forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from jdcore.autogram import Engine
from tests.core.autogram.oracle import check_engine, explicit_jacobian, randn, relative_error

B, T, E = 5, 4, 8


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MASK = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, False, True]] * 2 + [[False] * 4] * 3)


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize(
    "options", [{"dropout": 0.0}, {"dropout": 0.3}, {"norm_first": True}, {"activation": "gelu"}]
)
def test_transformer_encoder(options: dict[str, Any]) -> None:
    def tasks(model: nn.Module) -> Tensor:
        return model(randn(B, T, E)).pow(2).sum(1)

    check_engine(lambda: _encoder(**options), lambda m: tasks(m).sum(1), 0)
    check_engine(lambda: _encoder(**options), lambda m: tasks(m)[:, :3], 0)
    check_engine(lambda: _encoder(**options), lambda m: tasks(m).mean(0)[:3], None)


@pytest.mark.usefixtures("only_closed_forms")
def test_transformer_encoder_with_masks() -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, T, E), mask=MASK, src_key_padding_mask=PADDING).pow(2).sum((1, 2))

    check_engine(_encoder, losses, 0)


@pytest.mark.usefixtures("only_closed_forms")
def test_transformer_with_cross_attention() -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, T, E), randn(B, 3, E)).pow(2).sum((1, 2))

    check_engine(lambda: nn.Transformer(E, 2, 1, 1, 16, dropout=0.1, batch_first=True), losses, 0)


class _Attention(nn.Module):
    def __init__(self, separate: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True, **options)
        self.keys, self.values = (
            nn.Linear(E, options.get("kdim", E)),
            nn.Linear(E, options.get("vdim", E)),
        )
        self.separate = separate

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        keys = self.keys(y)
        values = self.values(y) if self.separate else keys
        out, weights = self.attention(x, keys, values, **options)
        return out.pow(2).sum((1, 2)) + weights.pow(2).flatten(1).sum(1)


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.2}])
def test_cross_attention_and_its_weights(separate: bool, options: dict[str, Any]) -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, T, E), randn(B, 3, E), average_attn_weights=False)

    check_engine(lambda: _Attention(separate, **options), losses, 0)


@pytest.mark.parametrize(
    "options", [{"kdim": 6, "vdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_unusual_attention(options: dict[str, Any]) -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, T, E), randn(B, 3, E))

    check_engine(lambda: _Attention(True, **options), losses, 0)


RECURRENT = {
    "rnn": lambda **o: nn.RNN(6, 4, batch_first=True, **o),
    "rnn with relu": lambda **o: nn.RNN(6, 4, batch_first=True, nonlinearity="relu", **o),
    "lstm": lambda **o: nn.LSTM(6, 4, batch_first=True, **o),
    "gru": lambda **o: nn.GRU(6, 4, batch_first=True, **o),
}


class _Sequence(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Linear(6, 6), recurrent

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.recurrent(self.embed(x))
        last = state[0] if isinstance(state, tuple) else state
        return out.pow(2).sum(1)[:, :2] + last.pow(3).sum(0)[:, :2]


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"num_layers": 2, "dropout": 0.3},
    ],
)
def test_recurrent_layers(name: str, options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return _Sequence(RECURRENT[name](**options))

    check_engine(make, lambda m: m(randn(B, T, 6)).sum(1), 0)
    check_engine(make, lambda m: m(randn(B, T, 6)), 0)
    check_engine(make, lambda m: m(randn(B, T, 6)).mean(0), None)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_lstm_with_projections_and_initial_state() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.lstm = nn.Linear(6, 3), nn.LSTM(6, 4, batch_first=True, proj_size=3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x[:, 0])[None]
            out, _ = self.lstm(x, (h, torch.zeros(1, len(x), 4)))
            return out

    check_engine(Stateful, lambda m: m(randn(B, T, 6)).pow(2).sum((1, 2)), 0)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cell: Callable[..., nn.Module]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(T):
                state = self.cell(x[:, t], state)
            return state[0] if isinstance(state, tuple) else state

    check_engine(Loop, lambda m: m(randn(B, T, 6)).pow(2).sum(1), 0)


@pytest.mark.usefixtures("only_closed_forms")
def test_layers_with_time_before_samples_inside_of_a_model() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            _, (h, _) = self.lstm(x.transpose(0, 1))
            return h[-1]

    for steps in (1, T, B):
        check_engine(TimeFirst, lambda m, n=steps: m(randn(B, n, 6)).pow(2).sum(1), 0)


def test_a_layout_is_not_remembered_from_a_batch_that_hides_it() -> None:
    model = nn.MultiheadAttention(E, 2, batch_first=True)
    engine = Engine(model, batch_dim=0)
    for steps in (1, T, B, 1):
        x = randn(B, steps, E)
        losses = model(x, x, x)[0].pow(2).sum((1, 2))
        jacobian = explicit_jacobian(losses, list(model.parameters()))
        assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12


class _StartsAtZero(nn.Module):
    """Time comes first inside, and at first no gradient passes the last layer."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.out = recurrent, nn.Linear(4, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("steps", [1, T, B, 2 * B])
def test_a_layout_is_not_learnt_from_gradients_of_zero(
    kind: Callable[..., nn.Module], steps: int
) -> None:
    model = _StartsAtZero(kind(6, 4))
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        losses = (model(randn(B, steps, 6)) + 1.0).pow(2).sum(1)
        jacobian = explicit_jacobian(losses, list(model.parameters()))
        assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12
        nn.init.normal_(model.out.weight)


def test_a_layout_is_not_learnt_from_single_steps() -> None:
    # Sample b looks at step b only: first of all, these gradients fit several layouts.
    model = _StartsAtZero(nn.GRU(6, 4))
    engine = Engine(model, batch_dim=0)
    for chosen in (torch.arange(2), torch.zeros(2, dtype=torch.int64)):
        x = randn(2, 2, 6)
        out, _ = model.recurrent(x.transpose(0, 1))
        losses = out[chosen, torch.arange(2)].pow(2).sum(1)
        parameters = list(model.recurrent.parameters())
        jacobian = explicit_jacobian(losses, parameters)
        assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12


class _Functional(nn.Module):
    """All layers written with functions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(4))
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x) @ self.table)
        return functional.linear(h, self.weight, self.bias)


@pytest.mark.usefixtures("only_closed_forms")
@pytest.mark.parametrize("shape", [(B, 6), (B, 3, 6)])
def test_functional_layers(shape: tuple[int, ...]) -> None:
    check_engine(_Functional, lambda m: m(randn(*shape)).pow(2).reshape(B, -1).sum(1), 0)
