"""Parameters that are used anywhere, in any way."""

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


class _Closed(nn.Module):
    """Layers with a closed form only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    @property
    def used(self) -> nn.Parameter:
        return self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


class _Open(_Closed):
    """The same with a layer that the generic rule serves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x, x))))


class _Direct(_Closed):
    """The same with parameters that the model uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = None
        self.weight = nn.Parameter(0.2 * torch.randn(6, 6))

    @property
    def used(self) -> nn.Parameter:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(x @ self.weight)))


class _Attention(_Closed):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, batch_first=True)

    @property
    def used(self) -> nn.Parameter:
        return self.first.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, x.sin()], 1)
        return self.last(self.norm(self.first(steps, steps, steps)[0].sum(1)))


def _functional(model: Any, x: Tensor) -> Tensor:
    return model(x) + functional.linear(x, model.used.reshape(-1, 6)).pow(2).sum(1, keepdim=True)


def _decay(model: Any, x: Tensor) -> Tensor:
    return model(x) + 0.1 * model.used.square().sum()


def _decay_of_all(model: Any, x: Tensor) -> Tensor:
    return model(x) + 0.1 * sum(p.square().sum() for p in model.parameters())


def _scaled_by_its_mean(model: Any, x: Tensor) -> Tensor:
    return model(x * model.used.mean())


def _of_its_rows(model: Any, x: Tensor) -> Tensor:
    """Every sample picks entries of the parameter by itself."""
    return model(x) + model.used.reshape(-1)[:B, None] * x[:, :1]


def _hooked(model: Any, x: Tensor) -> Tensor:
    used = model.used
    handle = model.last.register_forward_hook(lambda _, __, out: out * used.mean())
    try:
        return model(x)
    finally:
        handle.remove()


USES: list[Callable[[Any, Tensor], Tensor]] = [
    _functional,
    _decay,
    _decay_of_all,
    _scaled_by_its_mean,
    _of_its_rows,
    _hooked,
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [_Closed, _Open, _Direct, _Attention])
def test_any_parameter_may_be_used_anywhere(
    make: Callable[[], nn.Module], use: Callable[[Any, Tensor], Tensor]
) -> None:
    check_engine(make, lambda m: use(m, randn(B, 6)).pow(2).sum(1), 0)
    check_engine(make, lambda m: use(m, randn(B, 6)).pow(2), 0)
    check_engine(make, lambda m: use(m, randn(B, 6)).pow(2).mean(0), None)


def test_detached_uses_do_not_matter() -> None:
    def losses(model: Any) -> Tensor:
        with torch.no_grad():
            scale = model.used.mean()
        return (model(randn(B, 6)) * scale + model.used.detach().sum()).pow(2).sum(1)

    check_engine(_Closed, losses, 0)


@pytest.mark.parametrize("given", ["input", "indices"])
def test_an_input_modified_in_place_raises_as_in_a_backward_pass(given: str) -> None:
    model = nn.Conv1d(2, 3, 1) if given == "input" else nn.Embedding(9, 3)
    engine = Engine(model, batch_dim=0)
    x = torch.ones(B, 2, 4, dtype=torch.int64) if given == "indices" else randn(B, 2, 4)
    out = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.compute_gramian(out.pow(2).flatten(1).sum(1))


def test_a_result_modified_in_place_is_served() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.bias)

    check_engine(
        lambda: nn.Sequential(nn.Linear(6, 6), Adding()), lambda m: m(randn(B, 6)).pow(2).sum(1), 0
    )


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("weigh", [lambda gramian: torch.ones(len(gramian)), torch.diag])
def test_both_terms_of_a_sum_get_gradients_of_their_own(weigh: Any, batch_dim: int | None) -> None:
    """Torch hands the same tensor to both; what changes one in place must leave the other."""
    model, a, b = nn.Linear(3, 3), randn(3).requires_grad_(), randn(3).requires_grad_()

    losses = model(a + b + torch.eye(3)).square().sum(1)
    Engine(model, batch_dim=batch_dim).backward(losses, weigh)

    assert a.grad is not None
    assert b.grad is not None
    before = b.grad.clone()
    a.grad.zero_()
    assert torch.equal(b.grad, before)
