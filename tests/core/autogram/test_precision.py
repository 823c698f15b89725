from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from tests.core.autogram.oracle import (
    explicit_jacobian,
    flattened,
    parameters_of,
    relative_error,
)

B = 6


@pytest.fixture(autouse=True)
def _float32(_float64: None) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 3),
    )


def _truth(model: nn.Module, losses_of: Callable[[nn.Module], Tensor]) -> Tensor:
    """Gramian of the same model in float64."""
    double = model.double()
    jacobian = explicit_jacobian(losses_of(double), parameters_of([double]))
    model.float()
    return jacobian @ jacobian.T


def _like(model: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_float32_error(name: str, batch_dim: int | None) -> None:
    if name == "mlp":
        model, x = (
            nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3)),
            torch.randn(B, 64),
        )
    elif name == "cnn":
        model, x = _cnn(), torch.randn(B, 3, 16, 16)
    else:
        model, x = _encoder(), torch.randn(B, 10, 5)

    def losses_of(model: nn.Module) -> Tensor:
        squares = model(_like(model, x)).pow(2).reshape(B, -1, 3).mean(1)
        return squares.sum(1) if batch_dim == 0 else squares.mean(0)

    engine = Engine(model, batch_dim=batch_dim)
    gramian = engine.compute_gramian(losses_of(model))
    assert gramian.dtype == torch.float32
    assert relative_error(gramian, _truth(model, losses_of)) <= 1e-6


@pytest.mark.parametrize("batch_dim", [0, None])
def test_float32_error_of_ten_million_parameters(batch_dim: int | None) -> None:
    # Positive inputs, weights and losses: all rows point the same way, the worst case for sums.
    model = nn.Sequential(nn.Linear(1000, 9000), nn.Linear(9000, 3))
    for p in model.parameters():
        p.data.abs_()
    x = torch.rand(4, 1000)

    def losses_of(model: nn.Module) -> Tensor:
        squares = model(_like(model, x)).square()
        return squares.sum(1) if batch_dim == 0 else squares.mean(0)

    engine = Engine(model, batch_dim=batch_dim)
    gramian = engine.compute_gramian(losses_of(model))
    assert relative_error(gramian, _truth(model, losses_of)) <= 1e-6


def test_float32_error_of_rows_from_backward_passes() -> None:
    parameter = nn.Parameter(torch.rand(5_000_000))

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = parameter

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(self.scale * x).sum(), (self.scale.sqrt() * x).sum()])

    model, x = Weighted(), torch.rand(5_000_000)
    engine = Engine(model, batch_dim=None)
    gramian = engine.compute_gramian(model(x))

    def losses_of(model: nn.Module) -> Tensor:
        return model(_like(model, x))

    assert relative_error(gramian, _truth(model, losses_of)) <= 1e-6


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Linear(5, 8), nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.lstm(self.table(x))[0]))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (_cnn, (3, 16, 16)),
    "encoder": (_encoder, (4, 5)),
    "recurrent": (_Recurrent, (4, 5)),
}
HALF = [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


def _half_losses(out: Tensor, batch_dim: int | None) -> Tensor:
    squares = out.pow(2).reshape(B, -1, 3).mean(1)
    return squares.mean(1) if batch_dim == 0 else squares.mean(0)


@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_models(
    name: str, batch_dim: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    make, shape = MODELS[name]
    model, x = make().to(dtype), torch.randn(B, *shape)
    engine = Engine(model, batch_dim=batch_dim)

    def losses_of(model: nn.Module) -> Tensor:
        return _half_losses(model(_like(model, x)), batch_dim)

    losses = losses_of(model)
    jacobian = explicit_jacobian(losses.float(), list(model.parameters())).double()
    gramian = engine.compute_gramian(losses)
    assert gramian.dtype == torch.float32
    assert relative_error(gramian, jacobian @ jacobian.T) <= tolerance
    weights = engine.backward(losses_of(model), lambda g: g.diagonal() / g.trace())
    assert weights.dtype == torch.float32
    update = weights.double() @ jacobian
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert got.dtype == dtype
    assert relative_error(got, update) <= tolerance


@pytest.mark.parametrize("classes", [17, 31, 33])
@pytest.mark.parametrize("samples", [17, 40])
def test_odd_numbers_of_classes_in_bfloat16_keep_samples_apart(samples: int, classes: int) -> None:
    # On some CPUs, products of bfloat16 carry NaN from row to row where these have odd lengths.
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, classes)).bfloat16()
    losses = model(torch.randn(samples, 5).bfloat16()).float().square().mean(1)
    jacobian = explicit_jacobian(losses, list(model.parameters())).double()
    gramian = Engine(model, batch_dim=0).compute_gramian(losses)
    assert relative_error(gramian, jacobian @ jacobian.T) <= 2e-2


def test_gramians_of_half_precision_models_do_not_overflow() -> None:
    model = nn.Linear(8, 1).half()
    engine = Engine(model, batch_dim=0)
    losses = 100.0 * model(50.0 * torch.ones(2, 8, dtype=torch.float16)).squeeze(1)
    # (100 * 50)^2 * 8 + 100^2 is beyond the range of float16.
    torch.testing.assert_close(engine.compute_gramian(losses), torch.full((2, 2), 200_010_000.0))


@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(
    name: str, batch_dim: int | None, inside: bool, dtype: torch.dtype, tolerance: float
) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(B, *shape)
    engine = Engine(model, batch_dim=batch_dim)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype):
            return _half_losses(model(x).float(), batch_dim)

    jacobian = explicit_jacobian(losses(), list(model.parameters())).double()
    outputs = losses(), losses()
    with torch.autocast("cpu", dtype, enabled=inside):
        gramian = engine.compute_gramian(outputs[0])
        weights = engine.backward(outputs[1], lambda g: g.diagonal() / g.trace())
    assert gramian.dtype == torch.float32
    assert relative_error(gramian, jacobian @ jacobian.T) <= tolerance
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert relative_error(got, weights.double() @ jacobian) <= tolerance


def test_losses_that_are_not_finite_give_a_gramian_that_is_not() -> None:
    model = nn.Linear(3, 1)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.tensor([[1.0, 2.0, 3.0], [float("inf"), 0.0, 0.0]])).squeeze(1)
    gramian = engine.compute_gramian(losses)
    assert gramian[0, 0] == 15.0
    assert not torch.isfinite(gramian[1, 1])


def _twice(model: nn.Module) -> Tensor:
    """Two uses of all layers whose gradients are nearly opposite."""
    x = _like(model, _fixed(80, 8))
    return ((1 + 1e-3) * model(x).sin() - model(x).sin())[:, 0]


def _sequences(model: nn.Module) -> Tensor:
    """Positions that are nearly alike, with weights whose sum is zero."""
    x = _like(model, _fixed(B, 1, 8) + 1e-3 * _fixed(B, 5, 8))
    return (model(x).square().sum(2) * _like(model, torch.tensor([1.0, -1, 2, -2, 0]))).sum(1)


def _sequences_of_tasks(model: nn.Module) -> Tensor:
    x = _like(model, _fixed(B, 1, 8) + 1e-3 * _fixed(B, 5, 8))
    scales = _like(model, torch.tensor([[1.0, -1, 2, -2, 0], [2.0, 1, -1, 0, -2]]))
    return torch.einsum("bto,kt->bk", model(x).square(), scales)


def _batches(model: nn.Module) -> Tensor:
    """Samples that are nearly alike, with weights whose sum is zero, for two tasks of a trunk."""
    x = _like(model, _fixed(1, 8) + 1e-3 * _fixed(24, 8))
    signs = _like(model, torch.tensor([1.0, -1.0]).repeat(12))
    out = model(x)
    return torch.stack([(out[:, k].sin() * signs).mean() for k in range(2)])


def _fixed(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("budget", [None, 1 << 28])
@pytest.mark.parametrize(
    ("losses_of", "batch_dim"),
    [(_twice, 0), (_sequences, 0), (_sequences_of_tasks, 0), (_batches, None)],
)
def test_what_is_summed_up_to_a_row_may_cancel(
    losses_of: Callable[[nn.Module], Tensor], batch_dim: int | None, budget: int | None
) -> None:
    model = nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 64))
    expected = _truth(model, losses_of)
    rows = explicit_jacobian(losses_of(model), parameters_of([model])).double()
    losses = losses_of(model)
    gramian = Engine(model, batch_dim=batch_dim, memory_budget=budget).compute_gramian(losses)
    got = flattened(gramian, losses.ndim).double()
    lengths = expected.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    # Not better than rows of float32, which lose as many digits before the Gramian is made.
    error = ((rows @ rows.T - expected) / scale).abs().max()
    assert error < 1e-3
    assert ((got - expected) / scale).abs().max() <= 3 * error


@pytest.mark.parametrize("budget", [None, 1 << 24])
def test_the_square_of_a_row_whose_positions_cancel_is_not_negative(budget: int | None) -> None:
    signs = torch.cat([torch.ones(5), -torch.ones(5)])[:, None]
    for _ in range(20):
        half, model = torch.randn(3, 5, 64), nn.Linear(64, 64, bias=False)
        losses = (model(torch.cat([half, half.flip(1)], 1)) * signs).sum((1, 2))
        gramian = Engine(model, batch_dim=0, memory_budget=budget).compute_gramian(losses)
        assert gramian.diagonal().min() >= 0.0
        assert gramian.abs().max() < 1e-9
