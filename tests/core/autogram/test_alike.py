"""Layers of one form, which accelerators compute together; a budget asks for the same on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore import autogram
from jdcore.autogram import Engine
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error
from tests.operations import Operations

B, T, D, LAYERS = 4, 6, 8, 6
BUDGET = 1 << 24


class _Transposed(nn.Module):
    """A layer whose weight is multiplied as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D) / 3), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Narrow(nn.Module):
    """Few positions and wide layers: rows are cheaper than matrices of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class _Scaled(nn.Module):
    """A product and a bias that are scaled, each layer by other numbers if asked for."""

    made = 0

    def __init__(self, alpha: float, beta: float, step: float) -> None:
        super().__init__()
        _Scaled.made += 1
        self.alpha, self.beta = alpha + step * (_Scaled.made % 3), beta
        self.weight, self.bias = (
            nn.Parameter(torch.randn(D, D) / 3),
            nn.Parameter(torch.randn(1, D)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, alpha=self.alpha, beta=self.beta)


class _TurnedBias(nn.Module):
    """A bias that is a column, and is added as a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(D, D) / 3),
            nn.Parameter(torch.randn(D, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias.t(), x, self.weight)


class _OfNothing(nn.Module):
    """A layer without inputs, which adds its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(D, 0)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(x[..., :0], self.weight, self.bias)


class _Grouped(nn.Module):
    """Images, and norms of groups of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, T) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x.sin())
        return x


class _Attention(nn.Module):
    """Attention as torch has it, which brings samples behind positions for its products."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _deep(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(make(), nn.Tanh()) for _ in range(LAYERS)))


def _mixed() -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Tanh()) for _ in range(LAYERS))
    )


def _tied() -> nn.Module:
    shared = nn.Linear(D, D)
    return nn.Sequential(nn.Linear(D, D), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(D, D))


def _partly_frozen() -> nn.Module:
    model = _mixed()
    for parameter in list(model.parameters())[1::3]:
        parameter.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (lambda: _deep(lambda: nn.Linear(D, D)), (B, D)),
    "layers of sequences": (lambda: _deep(lambda: nn.Linear(D, D)), (B, T, D)),
    "layers of long sequences": (lambda: _deep(lambda: nn.Linear(D, D)), (2, 64, D)),
    "without bias": (lambda: _deep(lambda: nn.Linear(D, D, bias=False)), (B, T, D)),
    "weights as they are": (lambda: _deep(_Transposed), (B, T, D)),
    "up and down": (lambda: _deep(_Narrow), (B, T, D)),
    "norms": (_mixed, (B, T, D)),
    "norms without positions": (_mixed, (B, D)),
    "biases that lie turned": (lambda: _deep(_TurnedBias), (B, D)),
    "layers of nothing": (lambda: _deep(_OfNothing), (B, D)),
    "layers of nothing at each position": (lambda: _deep(_OfNothing), (B, T, D)),
    "norms of groups": (_Grouped, (B, T, D, 2)),
    "norms of groups of pixels": (_Grouped, (B, T)),
    "scaled": (lambda: _deep(lambda: _Scaled(2.0, 2.0, 0.0)), (B, D)),
    "scaled apart": (lambda: _deep(lambda: _Scaled(2.0, 3.0, 0.0)), (B, D)),
    "scaled each by another number": (lambda: _deep(lambda: _Scaled(2.0, 2.0, 1.0)), (B, D)),
    "RMS norms": (lambda: _deep(lambda: nn.RMSNorm(D)), (B, T, D)),
    "attention": (lambda: _deep(_Attention), (B, T, D)),
    "as many samples as positions": (lambda: _deep(_Attention), (B, B, D)),
    "attention to one position": (lambda: _deep(_Attention), (B, 1, D)),
    "tied": (_tied, (B, T, D)),
    "partly frozen": (_partly_frozen, (B, T, D)),
    "one sample": (_mixed, (1, T, D)),
}


def _losses(model: nn.Module, x: Tensor, tasks: int = 1) -> Tensor:
    squares = model(x).square().flatten(1)
    losses = torch.stack([squares.sum(1), (squares[:, 1:] - 1).sum(1)], 1)
    return losses if tasks == 2 else losses[:, 0]


# With the last but one, a part of the layers may be copied and kept, with the last one a few.
@pytest.mark.parametrize("budget", [BUDGET, 1 << 13, 1 << 11])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_one_form_give_the_rows_of_plain_passes(
    name: str, tasks: int, budget: int
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), randn(*shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine = Engine(model, batch_dim=0, memory_budget=budget)
    rows = explicit_jacobian(_losses(model, x, tasks), parameters)
    m, seen = len(rows), list[Tensor]()
    weights = torch.linspace(-1.0, 2.0, m)

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return weights.reshape(gramian.shape[: gramian.ndim // 2])

    engine.backward(_losses(model, x, tasks), weighting)
    gramian = seen[0].permute(0, 1, 3, 2).reshape(m, m) if tasks == 2 else seen[0]
    assert relative_error(gramian, rows @ rows.T) < 1e-12
    found = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    assert relative_error(found, weights @ rows) < 1e-12
    assert relative_error(engine.compute_gramian(_losses(model, x, tasks)), seen[0]) < 1e-12


def test_norms_that_are_too_large_to_be_multiplied_together_are_right() -> None:
    model, x = nn.Sequential(*(nn.LayerNorm(1 << 16) for _ in range(3))), randn(2, 2, 1 << 16)
    parameters = list(model.parameters())
    engine = Engine(model, batch_dim=0, memory_budget=1 << 28)
    rows = explicit_jacobian(_losses(model, x), parameters)
    seen: list[Tensor] = []
    engine.backward(_losses(model, x), lambda g: (seen.append(g), torch.tensor([1.0, -2.0]))[1])
    assert relative_error(seen[0], rows @ rows.T) < 1e-12
    found = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert relative_error(found, rows[0] - 2 * rows[1]) < 1e-12


@pytest.mark.parametrize("name", ["layers", "layers of sequences", "norms"])
def test_products_and_sums_do_not_grow_with_the_number_of_layers(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    counted = ("mm", "bmm", "addmm", "sum", "mul", "mul_")

    def operations(budget: int) -> int:
        engine = Engine(model, batch_dim=0, memory_budget=budget)
        engine.backward(_losses(model, randn(*shape)), lambda g: g.new_ones(len(g)))
        losses = _losses(model, randn(*shape))
        with Operations() as operations:
            engine.backward(losses, lambda g: g.new_ones(len(g)))
        return sum(operations.counts[kind] for kind in counted)

    # With the smaller budget none of the layers may be copied.
    assert operations(BUDGET) <= operations(16 * D * D) - 4 * LAYERS


def test_layers_whose_samples_do_not_come_first_are_served_together() -> None:
    def further(layers: int) -> Counter[str]:
        """Operations beyond those of a plain step."""
        model = nn.Sequential(*(_Attention() for _ in range(layers)))
        engine = Engine(model, batch_dim=0, memory_budget=BUDGET)
        counts = []
        steps: list[Callable[[Tensor], object]] = [
            lambda losses: losses.sum().backward(),
            lambda losses: engine.backward(losses, lambda g: g.new_ones(len(g))),
        ]
        for step in steps:
            step(_losses(model, randn(B, T, D)))
            losses = _losses(model, randn(B, T, D))
            with Operations() as operations:
                step(losses)
            counts.append(operations.counts)
        return counts[1] - counts[0]

    few, many = further(3), further(9)
    for kind in ("mm", "bmm", "sum", "mul", "clone", "permute"):
        assert many[kind] <= few[kind]


def test_the_rows_of_a_table_of_positions_wait_for_no_comparison() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, D), nn.Embedding(T, D)

        def forward(self, index: Tensor) -> Tensor:
            return (self.tokens(index) + self.positions(torch.arange(T)[None])).tanh()

    model, index = Embedded(), torch.arange(B * T).view(B, T) % 9
    rows = explicit_jacobian(_losses(model, index), list(model.parameters()))
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(_losses(model, index))
    losses = _losses(model, index)
    with Operations() as operations:
        gramian = engine.compute_gramian(losses)
    assert relative_error(gramian, rows @ rows.T) < 1e-12
    assert operations.counts["embedding_dense_backward"] == 1  # of all rows, and no other one


def test_gradients_of_parameters_that_were_added_have_memory_of_their_own() -> None:
    one, other, third = (nn.Parameter(randn(D, D)) for _ in range(3))
    losses = (randn(B, D) @ (one + other) @ third).square().sum(1)
    autogram.backward(losses, lambda gramian: gramian.diagonal(), batch_dim=0)
    places = {
        p.grad.untyped_storage().data_ptr() for p in (one, other, third) if p.grad is not None
    }
    assert len(places) == 3


def test_gradients_of_layers_of_one_form_have_memory_of_their_own() -> None:
    model = _mixed()
    engine = Engine(model, batch_dim=0, memory_budget=BUDGET)
    engine.backward(_losses(model, randn(B, T, D)), lambda g: g.new_ones(len(g)))
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes
        assert parameter.grad.is_contiguous()


def test_layers_of_one_form_are_right_in_half_precision() -> None:
    torch.manual_seed(0)
    model, x = _mixed().float(), torch.randn(B, T, D, dtype=torch.float32)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _losses(model, x)

    rows = explicit_jacobian(losses(), list(model.parameters())).double()
    engine = Engine(model, batch_dim=0, memory_budget=BUDGET)
    assert relative_error(engine.compute_gramian(losses()), rows @ rows.T) < 1e-2
    engine.backward(losses(), lambda g: torch.ones(B))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert relative_error(found, rows.sum(0)) < 1e-2
