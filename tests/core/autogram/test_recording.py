from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from jdcore.autogram import Engine
from tests.core.autogram.oracle import (
    check_engine,
    explicit_jacobian,
    parameters_of,
    randn,
    relative_error,
)

B = 5
TOKENS = torch.randint(0, 9, (B, 7), generator=torch.Generator().manual_seed(3))


def _one(model: nn.Module) -> Tensor:
    return model(randn(B, 6)).pow(2).sum(1)


def _tasks(model: nn.Module) -> Tensor:
    return model(randn(B, 6)).pow(2)[:, :2]


def _whole(model: nn.Module) -> Tensor:
    return model(randn(B, 6)).pow(2).mean(0)[:2]


KINDS = {"samples": (_one, 0), "tasks": (_tasks, 0), "whole": (_whole, None)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[[nn.Module], Tensor], int | None]:
    return KINDS[request.param]


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


def test_reused_modules(kind: Any) -> None:
    check_engine(_Reuse, *kind)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.c.weight = self.a.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_weights_tied_across_modules(kind: Any) -> None:
    check_engine(_Tied, *kind)


class _TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.table(tokens)))


def test_weights_tied_between_different_layers() -> None:
    check_engine(_TiedEmbedding, lambda m: m(TOKENS).pow(2).sum((1, 2)), 0)
    check_engine(_TiedEmbedding, lambda m: m(TOKENS).pow(2).sum(1)[:, :2], 0)
    check_engine(_TiedEmbedding, lambda m: m(TOKENS).pow(2).sum((0, 1))[:2], None)


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


def test_in_place_operations_on_outputs(kind: Any) -> None:
    check_engine(_InPlace, *kind)


def test_in_place_operations_on_outputs_that_are_views() -> None:
    def losses(model: nn.Module) -> Tensor:
        hidden = model[0](randn(B, 4, 6))
        assert hidden[0]._is_view()
        hidden[:, 1].mul_(3.0)
        return model[1](hidden.relu_()).pow(2).sum((1, 2))

    check_engine(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), losses, 0)


class _Frozen(_InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)
        self.c.requires_grad_(False)


def test_frozen_and_unused_parameters(kind: Any) -> None:
    check_engine(_Frozen, *kind)


class _Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.b(x)
        with torch.no_grad():
            self.a(x)
        return self.a(x) * self.a(2 * x).detach()


def test_detached_unused_and_ungraded_calls(kind: Any) -> None:
    check_engine(_Partial, *kind)


def test_stray_forward_passes_do_not_matter() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    model(randn(9, 6)).sum().backward()
    losses = _one(model)
    model(randn(2, 6))
    jacobian = explicit_jacobian(losses, list(model.parameters()))
    assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12


def test_two_forward_passes_may_be_waiting() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = Engine(model, batch_dim=0)
    first, second = _one(model), model(randn(3, 6)).sum(1)
    for losses in (second, first):
        jacobian = explicit_jacobian(losses, list(model.parameters()))
        assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [head(hidden) for head in self.heads]


def test_several_heads() -> None:
    def samples(model: nn.Module) -> Tensor:
        return torch.stack([o.pow(2).sum(1) for o in model(randn(B, 6))], 1)

    def whole(model: nn.Module) -> Tensor:
        return torch.stack([o.pow(2).mean() for o in model(randn(B, 6))])

    check_engine(_Heads, samples, 0)
    check_engine(_Heads, whole, None)


def test_heads_outside_of_the_engine_get_their_gradients() -> None:
    def samples(model: nn.Module) -> Tensor:
        return torch.stack([o.pow(2).sum(1) for o in model(randn(B, 6))], 1)

    def whole(model: nn.Module) -> Tensor:
        return torch.stack([o.pow(2).mean() for o in model(randn(B, 6))])

    check_engine(_Heads, samples, 0, lambda m: [m.trunk])
    check_engine(_Heads, whole, None, lambda m: [m.trunk])
    check_engine(_Heads, samples, 0, lambda m: [m.heads])


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


def test_nested_inputs_and_outputs_and_arguments_that_are_no_tensors(kind: Any) -> None:
    check_engine(_Outer, *kind)


class _Attending(nn.Module):
    """Layers given by keyword; parameters used by the parent: a class token, positions, scales."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.rand(()) + 0.5)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.odd = nn.Parameter(torch.rand(4) + 0.5)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(input=x)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions
        h = (h - self.scale) * self.scale / self.temperature
        return self.out(torch.tanh(h @ self.mixing) * torch.softmax(self.odd, 0)).sum(1)


def test_parameters_used_by_a_module_with_children() -> None:
    def tasks(model: nn.Module) -> Tensor:
        return model(randn(B, 3, 6)).pow(2)

    check_engine(_Attending, lambda m: tasks(m).sum(1), 0)
    check_engine(_Attending, tasks, 0)
    check_engine(_Attending, lambda m: tasks(m).mean(0), None)


class _Recurrence(nn.Module):
    """A layer without a rule, called on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(3):
            h = torch.tanh(self.bilinear(h, x))
        return h


def test_a_layer_without_a_rule_called_on_its_own_output(kind: Any) -> None:
    check_engine(_Recurrence, *kind)


class _Memory(nn.Module):
    """A layer without a rule that hands gradients on through its state, past its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,ij->bj", x, self.weight)
        if self.state is not None:
            y = y * torch.tanh(self.state)
        self.state = y
        return y


class _WithMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = _Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.state = None
        self.memory(x)
        return self.memory(torch.sin(x))


def test_a_layer_whose_state_hands_on_gradients(kind: Any) -> None:
    check_engine(_WithMemory, *kind)


def test_dropout(kind: Any) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
            self.bilinear = nn.Bilinear(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.net(x)
            return self.bilinear(functional.dropout(h, 0.3), h)

    check_engine(Dropped, *kind)


def test_non_reentrant_checkpointing(kind: Any) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Nest())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.b, self.a(x), use_reentrant=False)

    class _Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bilinear = nn.Linear(6, 3), nn.Bilinear(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.bilinear(x, x)

    check_engine(Checkpointed, *kind)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrizations(wrap: Callable[..., nn.Module], kind: Any) -> None:
    check_engine(lambda: nn.Sequential(wrap(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)), *kind)


def test_spectral_norm_whose_forward_changes_its_state() -> None:
    check_engine(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)).eval()), _one, 0
    )


# Dynamo looks at `.grad` of every input, which warns for all that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_submodules(kind: Any) -> None:
    def make() -> nn.Module:
        compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="aot_eager")
        return nn.Sequential(nn.Linear(6, 6), compiled, nn.Linear(6, 3))

    check_engine(make, *kind)


@pytest.mark.parametrize("batch_dim", [0, 1, 2, -1])
def test_samples_along_any_dimension(batch_dim: int) -> None:
    def losses(model: nn.Module) -> Tensor:
        squares = model(randn(B, 6)).pow(2)
        return torch.stack([squares, squares.sin()], 2).movedim(0, batch_dim)

    check_engine(lambda: nn.Linear(6, 3), losses, batch_dim)


def test_losses_of_any_shape_without_samples() -> None:
    check_engine(lambda: nn.Linear(6, 4), lambda m: m(randn(B, 6)).mean(0).view(2, 2), None)
    check_engine(lambda: nn.Linear(6, 4), lambda m: m(randn(B, 6)).pow(2).mean(), None)


def test_samples_folded_with_positions() -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(B, 3, 6).flatten(0, 1)).view(B, -1).pow(2).sum(1)

    check_engine(lambda: nn.Linear(6, 4), losses, 0)


def test_a_leaf_that_is_no_parameter_gets_its_gradient() -> None:
    model, x = nn.Linear(6, 3), randn(B, 6).requires_grad_()
    engine = Engine(model, batch_dim=0)
    engine.backward(model(x).pow(2).sum(1), torch.diag)
    fused = x.grad.clone()
    x.grad = None
    losses = model(x).pow(2).sum(1)
    losses.backward(engine.compute_gramian(losses).diagonal())
    assert relative_error(fused, x.grad) < 1e-12


def test_an_empty_batch() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.zeros(0, 6)).sum(1)
    assert engine.compute_gramian(losses).shape == (0, 0)
    assert engine.backward(losses, torch.diag).shape == (0,)


def test_nothing_is_left_of_forward_passes_that_are_dropped() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), _Recurrence3())
    engine = Engine(model, batch_dim=0)
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
    assert engine.batch_dim == 0


class _Recurrence3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bilinear(x, x)
        return y.add_(x)


def _tensors() -> int:
    return sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))


def test_an_engine_that_is_dropped_stops_recording() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    assert model._forward_hooks
    del engine
    assert not model._forward_hooks


def test_two_engines_on_one_module() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    by_sample, whole = Engine(model, batch_dim=0), Engine(model[0], batch_dim=None)
    losses = _one(model)
    for engine, parameters in (
        (by_sample, parameters_of([model])),
        (whole, parameters_of([model[0]])),
    ):
        jacobian = explicit_jacobian(losses, parameters)
        assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12
