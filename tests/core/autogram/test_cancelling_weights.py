"""Weights that float32 cannot carry: their rows cancel, and what is left counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward

# Two equal rows, weighed so that a third of one is left. The first weight is rounded to 1e6 + 5/16.
WEIGHTS = torch.tensor([1e6 + 1.0 / 3.0, -1e6, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _float32(_float64: None) -> None:
    torch.set_default_dtype(torch.float32)


def _whole(*shape: int) -> Tensor:
    """Three samples of small whole numbers, of which float32 makes no errors; two are equal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, shape, generator=generator).float()
    x[1] = x[0]
    return x


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.layer(x.flip(1))


class _Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(5, 3), _whole(3, 5)),
    "sequence": lambda: (nn.Linear(5, 3), _whole(3, 7, 5)),
    "embedding": lambda: (nn.Embedding(9, 4), _whole(3, 6).abs().long()),
    "convolution": lambda: (nn.Conv2d(2, 3, 3), _whole(3, 2, 6, 6)),
    "groups": lambda: (nn.Conv2d(2, 4, 3, groups=2), _whole(3, 2, 6, 6)),
    "tied": lambda: (_Tied(), _whole(3, 4)),
    "vector": lambda: (_Scale(6), _whole(3, 6)),
    "long vector": lambda: (_Scale(70_000), _whole(3, 70_000)),
}


def _losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).sum(1)


def _expected(model: nn.Module, x: Tensor) -> list[Tensor]:
    row = torch.autograd.grad(_losses(model, x)[0], list(model.parameters()))
    return [gradient.double() / 3.0 for gradient in row]


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("case", CASES)
def test_the_engine_sums_in_float64_what_cancels(case: str, batch_dim: int | None) -> None:
    model, x = CASES[case]()
    expected = _expected(model, x)
    Engine(model, batch_dim=batch_dim).backward(_losses(model, x), lambda gramian: WEIGHTS)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gramian_backward_sums_in_float64_what_cancels(case: str) -> None:
    model, x = CASES[case]()
    expected = _expected(model, x)
    gramian_backward(_losses(model, x), lambda gramian: WEIGHTS)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-6, atol=1e-6)


def test_weights_outside_the_range_of_float32_do_not_overflow() -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1e-20, 0.0], [0.0, 1e20]])
    weights = torch.tensor([1e40, 1e-40], dtype=torch.float64)
    Engine(model, batch_dim=0).backward(model(x).squeeze(1), lambda gramian: weights)
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1e20, 1e-20]]))
