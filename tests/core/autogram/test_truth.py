"""
What the engine promises to be right about, each in both precisions.

Float64 against explicit Jacobians, row by row; float32 against the float64 truth of the same
parameters and inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from jdcore.autogram import Engine
from tests.core.autogram.oracle import (
    check_float32,
    check_float64,
    default_dtype,
    randn,
)

B = 5
TOKENS = torch.randint(0, 9, (B, 7), generator=torch.Generator().manual_seed(3))

CHECKS = {"float64": check_float64, "float32": check_float32}
Losses = Callable[[nn.Module], Tensor]


def _squares(model: nn.Module) -> Tensor:
    return model(randn(B, 6)).pow(2)


def _of_tokens(model: nn.Module) -> Tensor:
    return model(TOKENS).pow(2)


def _of_heads(model: nn.Module) -> Tensor:
    return torch.stack([out.pow(2).sum(1) for out in model(randn(B, 6))], 1)


def _one(squares: Tensor) -> Tensor:
    return squares.flatten(1).sum(1)


def _tasks(squares: Tensor) -> Tensor:
    return squares.reshape(B, -1, squares.shape[-1]).sum(1)[:, :2]


def _whole(squares: Tensor) -> Tensor:
    return _tasks(squares).mean(0)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "samples": (_one, 0),
    "tasks": (_tasks, 0),
    "tasks first": (lambda squares: _tasks(squares).T, 1),
    "whole": (_whole, None),
}


class _Reuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.linear(x)))
        h = self.norm(torch.tanh(self.linear(h)) + x)
        h = self.conv(torch.tanh(self.conv(torch.stack([h, x], 1))))
        return self.linear(h.sum(1))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.c.weight = self.a.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class _TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.table(tokens)))


class _Turned(nn.Module):
    """The transpose of a parameter is no factor of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 12), nn.Parameter(randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).view(-1, 3, 4) * self.scale.t()).flatten(1).tanh()


class _UsedInAllWays(nn.Module):
    """A table that is looked up twice, and a factor of two products, once transposed."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.table, self.norm, self.last = nn.Embedding(9, 9), nn.LayerNorm(9), last

    def forward(self, tokens: Tensor) -> Tensor:
        found = functional.one_hot(tokens, 9).to(self.table.weight) * 0.5
        if not self.last:
            found = self._looked_up(tokens)
        found = self.norm(found @ self.table.weight) @ self.table.weight.t()
        return self._looked_up(tokens) * found if self.last else found

    def _looked_up(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) + self.table(tokens.flip(1) // 2).tanh()


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.a(x), inplace=True)
        h = self.b(h)
        h[:, 0] = 0.0
        h.mul_(2.0)
        return self.c(h)


class _View(nn.Module):
    """A linear layer of more than two dimensions returns a view, which is then written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(torch.stack([x, x.sin(), x.cos()], 1))
        hidden[:, 1].mul_(3.0)
        return self.b(hidden.relu_())


class _Frozen(_InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)
        self.c.requires_grad_(False)


class _Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.b(x)
        with torch.no_grad():
            self.a(x)
        return self.a(x) * self.a(2 * x).detach()


class _Straying(nn.Module):
    """Passes forward that nothing depends on, before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.a(torch.cat([x, x]))
        h = torch.tanh(self.a(x))
        self.b(h[:2]).sum()
        out: Tensor = self.b(h)
        self.a(x.detach())
        return out


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [head(hidden) for head in self.heads]


class _Nested(nn.Module):
    """A leaf module with direct parameters and structured arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(
        self, inputs: dict[str, Any], factor: float, *, flag: str, options: tuple[Any, ...] = ()
    ) -> dict[str, Any]:
        assert (flag, options) == ("yes", (1, "k"))
        y = torch.tanh(inputs["x"][0] @ self.weight) * self.scale * factor
        return {"a": y, "nested": [(y.sum(1, keepdim=True), "text"), None]}


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.nested, self.last = nn.Linear(6, 6), _Nested(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        inputs = {"x": (self.first(x), "unused")}
        out = self.nested(inputs, 2.5, flag="yes", options=(1, "k"))
        return self.last(torch.cat([out["a"], out["nested"][0][0]], 1))


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return self.bilinear(functional.dropout(h, 0.3), h)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bilinear = nn.Linear(6, 3), nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.tanh(self.bilinear(x, x))


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.3), _Branches())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.b, self.a(x), use_reentrant=False)
        return out


def _compiled() -> nn.Module:
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="aot_eager")
    return nn.Sequential(nn.Linear(6, 6), compiled, nn.Linear(6, 3))


def _parametrized(wrap: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2))


@frozen
class Scenario:
    """A model, what it is called on, and which of its modules are meant."""

    make: Callable[[], nn.Module]
    squares: Losses = _squares
    modules: Callable[[Any], Sequence[nn.Module]] = lambda model: [model]


SCENARIOS = {
    "module reuse": Scenario(_Reuse),
    "tied weights across modules": Scenario(_Tied),
    "tied weights of different layers": Scenario(_TiedEmbedding, _of_tokens),
    "a transpose that scales": Scenario(_Turned),
    "one table in all ways": Scenario(_UsedInAllWays, _of_tokens),
    "one table in all ways, looked up at last": Scenario(lambda: _UsedInAllWays(True), _of_tokens),
    "in-place ReLU and other in-place operations": Scenario(_InPlace),
    "view outputs": Scenario(_View),
    "frozen and unused parameters": Scenario(_Frozen),
    "detached, unused and ungraded calls": Scenario(_Partial),
    "stray forwards": Scenario(_Straying),
    "several heads": Scenario(_Heads, _of_heads),
    "the trunk below several heads": Scenario(_Heads, _of_heads, lambda model: [model.trunk]),
    "the heads only": Scenario(_Heads, _of_heads, lambda model: [model.heads]),
    "nested inputs and outputs, arguments that are no tensors": Scenario(_Outer),
    "dropout": Scenario(_Dropped),
    "non-reentrant checkpointing": Scenario(_Checkpointed),
    "weight norm": Scenario(_parametrized(parametrizations.weight_norm)),
    "orthogonal parametrization": Scenario(_parametrized(parametrizations.orthogonal)),
    "compiled submodule": Scenario(_compiled),
}


# Dynamo looks at `.grad` of every input, which warns for all that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_gramian_and_gradient_are_true(name: str, kind: str, check: str) -> None:
    scenario = SCENARIOS[name]
    losses_of, batch_dim = KINDS[kind]
    CHECKS[check](
        scenario.make,
        lambda model: losses_of(scenario.squares(model)),
        batch_dim,
        scenario.modules,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_nothing_is_left_of_forward_passes_that_are_dropped(
    dtype: torch.dtype, batch_dim: int | None
) -> None:
    with default_dtype(dtype):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), _Adding())
        engine = Engine(model, batch_dim=batch_dim)
        for _ in range(10):
            model(randn(B, 6))
        gc.collect()
        before = _tensors()
        gc.disable()
        try:
            for _ in range(1000):
                model(randn(B, 6))
            assert _tensors() - before < 20
        finally:
            gc.enable()
        assert engine.batch_dim == batch_dim


class _Adding(nn.Module):
    """A layer without a rule whose result is then written to."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x).add_(x)


def _tensors() -> int:
    return sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))


class _Large(nn.Module):
    """Ten million parameters in layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(64, 256, 3, stride=2), nn.ReLU())
        self.lstm = nn.LSTM(256, 512, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(512)
        self.table = nn.Embedding(4000, 512)
        self.out = nn.Sequential(nn.Linear(512, 4096), nn.Tanh(), nn.Linear(4096, 512))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.second(self.conv(x)).flatten(2).transpose(1, 2)
        h = self.norm(self.lstm(positions)[0])
        return self.out(h + self.table(7 * torch.arange(h.shape[1]).expand(len(h), -1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["samples", "tasks", "whole"])
def test_ten_million_parameters_in_float32(kind: str) -> None:
    losses_of, batch_dim = KINDS[kind]

    def losses(model: nn.Module) -> Tensor:
        return losses_of(model(randn(B, 3, 13, 13)).pow(2))

    assert sum(p.numel() for p in _Large().parameters()) > 9_500_000
    check_float32(_Large, losses, batch_dim)
