"""Gramians of rows that nearly cancel: float64 products, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from jdcore.graph import _jacobian
from jdcore.graph._cancelling import multiplied, rows_cancel
from jdcore.linalg import rounding_shows
from tests.core.autogram.oracle import explicit_jacobian, relative_error


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a Gramian was made once more."""
    seen: list[bool] = []
    original = _jacobian.multiplied

    def noting(rows: int, precision: torch.dtype, added_up: Callable[[], Any]) -> Any:
        made: list[Any] = []

        def counted() -> Any:
            seen.extend([True] * len(made))
            made.append(added_up())
            return made[-1]

        return original(rows, precision, counted)

    monkeypatch.setattr(_jacobian, "multiplied", noting)
    return seen


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class _Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.exp() / 9)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 8)), (4, 8)),
    "sequences": (lambda: nn.Sequential(nn.Linear(8, 30), nn.LayerNorm(30)), (4, 3, 8)),
    "long sequences": (lambda: nn.Linear(8, 300), (4, 40, 8)),
    "images": (lambda: nn.Sequential(nn.Conv2d(2, 9, 3), nn.GroupNorm(3, 9)), (4, 2, 6, 6)),
    "layers of one form": (
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4))),
        (4, 3, 8),
    ),
    "used twice": (_Twice, (4, 8)),
    "derived": (_Derived, (4, 8)),
}


def _losses(model: nn.Module, x: Tensor, batch_dim: int | None) -> Tensor:
    outputs = model(x).flatten(1)
    scale = torch.linspace(-1, 2, outputs.shape[1], dtype=outputs.dtype)
    return ((outputs * scale).sin()).sum(1 if batch_dim is not None else 0)[:6]


def _smallest(gramian: Tensor) -> float:
    return float(torch.linalg.eigvalsh(gramian.double())[0])


@pytest.mark.parametrize("budget", [None, 1 << 24])  # with one, as on an accelerator
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_of_rows_that_cancel_is_right(
    name: str, batch_dim: int | None, budget: int | None, again: list[bool]
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(*shape)
    x[1] = x[0] * (1 + 1e-3)
    if batch_dim is None:
        with torch.no_grad():  # so that two of the losses are almost the same
            for parameter in model.parameters():
                if parameter.ndim > 1 and parameter.shape[0] > 1:
                    parameter[1] = parameter[0] * (1 + 1e-3)
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.ones(len(gramian))

    engine = Engine(model, batch_dim=batch_dim, memory_budget=budget)
    seen.append(engine.compute_gramian(_losses(model, x, batch_dim)).double())
    engine.backward(_losses(model, x, batch_dim), weighting)
    exact = copy.deepcopy(model).double()
    jacobian = explicit_jacobian(_losses(exact, x.double(), batch_dim), list(exact.parameters()))
    expected = jacobian @ jacobian.T
    cancels = rows_cancel(expected)
    assert again == [True, True] * cancels
    if batch_dim == 0:
        assert cancels
        rows = explicit_jacobian(_losses(model, x, 0), list(model.parameters())).double()
        # Rows that were rounded to float32 are what there is to be told.
        assert _smallest(seen[1]) == pytest.approx(_smallest(rows @ rows.T), rel=2e-2)
    update = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert torch.allclose(update.double(), jacobian.sum(0), atol=1e-5 * float(jacobian.norm()))


def test_rows_that_do_not_cancel_are_multiplied_once(again: list[bool]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.randn(6, 20)).square().sum(1)
    engine.compute_gramian(losses)
    engine.backward(losses, lambda gramian: torch.ones(6))
    assert again == []


def test_cancelling_knows_no_lengths_and_no_rows_of_zeros() -> None:
    rows = torch.tensor([[1e-9, 0.0, 0.0], [0.0, 1e9, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert not rows_cancel(rows @ rows.T)
    assert rows_cancel(torch.tensor([[1.0, 1e3], [1e3, 1e6 + 1e2]], dtype=torch.float64))
    assert not rows_cancel(torch.tensor([[1.0, 1e3], [1e3, 2e6]], dtype=torch.float64))
    assert not rows_cancel(torch.full((2, 2), torch.nan, dtype=torch.float64))
    assert not rows_cancel(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**70])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", MODELS)
def test_squares_may_leave_the_range_of_float32(
    name: str, batch_dim: int | None, scale: float
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(*shape)
    engine, seen = Engine(model, batch_dim=batch_dim), list[Tensor]()

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian.double())
        return torch.ones(len(gramian))

    for factor in (1.0, scale):
        engine.backward(_losses(model, x, batch_dim) * factor, weighting)
    assert relative_error(seen[1] / scale**2, seen[0]) < 1e-6


@pytest.mark.parametrize("m", [2, 17, 64])
def test_weights_of_rows_that_are_apart_need_no_float64(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, m, dtype=torch.float64, generator=generator)
    values = torch.logspace(-1.49, 0.0, m, dtype=torch.float64)  # eigenvalues of 1e-3 of the mean
    cosines = torch.linalg.qr(rows)[0] * values
    gramian = cosines @ cosines.T
    found, apart = multiplied(m, torch.float32, lambda: (gramian, False))
    assert torch.equal(found, gramian)
    worst = torch.linalg.eigh(gramian)[1][:, 0]
    for weights in (worst, worst / gramian.diagonal().sqrt(), *rows):
        assert not (apart and rounding_shows(weights, gramian))
    if m == 2:
        assert apart


def test_nothing_is_said_of_many_rows_and_of_those_that_cancel() -> None:
    for rows in (torch.eye(65), torch.ones(3, 1), torch.eye(3) * torch.nan):
        gramian = (rows @ rows.T).double()
        assert not multiplied(len(rows), torch.float32, lambda g=gramian: (g, False))[1]
    gramian = torch.eye(3, dtype=torch.float64)
    assert not multiplied(3, torch.float64, lambda: (gramian, False))[1]
    assert multiplied(3, torch.float32, lambda: (gramian, False))[1]
