from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import FrameType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from jdcore import RowByRowWarning, autogram
from jdcore.autogram import Engine
from jdcore.graph import Graph, _passes, _plan
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


def test_spectral_norm_whose_forward_changes_its_state() -> None:
    check_engine(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)).eval()), _one, 0
    )


@pytest.mark.parametrize("batch_dim", [0, 1, 2, -1])
def test_samples_along_any_dimension(batch_dim: int) -> None:
    def losses(model: nn.Module) -> Tensor:
        squares = model(randn(B, 6)).pow(2)
        return torch.stack([squares, squares.sin()], 2).movedim(0, batch_dim)

    check_engine(lambda: nn.Linear(6, 3), losses, batch_dim)


def test_losses_of_any_shape_without_samples() -> None:
    check_engine(lambda: nn.Linear(6, 4), lambda m: m(randn(B, 6)).mean(0).view(2, 2), None)
    check_engine(lambda: nn.Linear(6, 4), lambda m: m(randn(B, 6)).pow(2).mean(), None)


def test_losses_in_a_list_have_an_ordinary_gramian() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = [w.sum(), (w**2).sum()]
    assert autogram.gramian(losses, batch_dim=None).tolist() == [[2.0, 6.0], [6.0, 20.0]]
    assert autogram.gramian(torch.stack(losses), batch_dim=None).tolist() == [
        [2.0, 6.0],
        [6.0, 20.0],
    ]


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


@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_what_is_frozen_after_the_forward_pass_gets_nothing(
    batch_dim: int | None, second_pass: bool
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    losses = _one(model)
    model[0].weight.requires_grad_(False)
    jacobian = explicit_jacobian(losses, parameters_of([model]))
    engine = Engine(model, batch_dim=batch_dim)
    for gramian in (
        engine.compute_gramian(losses),
        autogram.gramian(losses, batch_dim=batch_dim),
    ):
        assert relative_error(gramian, jacobian @ jacobian.T) < 1e-12
    engine.backward(losses, lambda _: torch.ones(B), second_pass=second_pass)
    update = [p.grad.reshape(-1) for p in parameters_of([model]) if p.grad is not None]
    assert relative_error(torch.cat(update), jacobian.sum(0)) < 1e-12
    assert model[0].weight.grad is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_parameters_without_entries(batch_dim: int | None) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(6, 0), nn.Linear(0, 3)])
            self.table = nn.ParameterList([torch.randn(0, 3), torch.randn(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner[1](self.inner[0](x))
            return (x[:, :3] + hidden) @ torch.cat(list(self.table))

    check_engine(Joined, _one, batch_dim)


def test_samples_of_different_lengths_in_nested_tensors_go_row_by_row() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def losses() -> Tensor:
        parts = [randn(length, 6) for length in (2, 1, 3)]
        hidden = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
        return torch.nested.to_padded_tensor(hidden, 0.0).pow(2).sum((1, 2))

    jacobian = explicit_jacobian(losses(), parameters_of([model]))
    with pytest.warns(RowByRowWarning, match="nested"):
        gramian = Engine(model, batch_dim=0).compute_gramian(losses())
    assert relative_error(gramian, jacobian @ jacobian.T) < 1e-12


def test_a_checkpoint_is_computed_anew_once_for_each_pass() -> None:
    """Not for each of the products whose shares would come without rows."""
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(4)])
    forwards: list[int] = []

    def forward(x: Tensor) -> Tensor:
        forwards.append(1)
        hidden: Tensor = model(x)
        return hidden

    def losses() -> Tensor:
        hidden: Tensor = checkpoint(forward, randn(2, 40), use_reentrant=False)
        return hidden.pow(2).sum(0)[:2]

    Engine(model, batch_dim=None).backward(losses(), torch.diag)
    assert len(forwards) == 1 + 2


@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_modes_around_the_step_do_not_matter(
    mode: Callable[[], Any], batch_dim: int | None, second_pass: bool
) -> None:
    """Nor for what is computed anew in it, or added to its gradients later."""
    first, second = nn.Linear(6, 4).float(), nn.Linear(4, 2).float()
    weights = torch.linspace(-1, 2, B).float()
    engine = Engine(first, second, batch_dim=batch_dim)

    def losses() -> Tensor:
        hidden: Tensor = checkpoint(
            lambda x: first(x).tanh(), randn(B, 6).float(), use_reentrant=False
        )
        return second(hidden).pow(2).sum(1)

    parameters = parameters_of([first, second])
    jacobian = explicit_jacobian(losses(), parameters)
    output = losses()
    with mode():
        gramian = engine.compute_gramian(output)
        assert engine.verify(output).worst < 1e-5
        engine.backward(output, lambda _: weights, second_pass=second_pass)
    assert relative_error(gramian, jacobian @ jacobian.T) < 1e-5
    engine.backward(losses(), lambda _: weights)
    update = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    assert relative_error(update, 2 * weights @ jacobian) < 1e-5


def test_an_empty_batch() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.zeros(0, 6)).sum(1)
    assert engine.compute_gramian(losses).shape == (0, 0)
    assert engine.backward(losses, torch.diag).shape == (0,)


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


class _Position(nn.Module):
    """Adds a table that all samples share to what they are, before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer((x + self.table(torch.arange(4))[None]).tanh())
        return hidden.square().mean((1, 2))


def test_the_graph_above_derived_parameters_is_freed_as_it_is_passed() -> None:
    """Gradients of the table come later, from an operation that the pass does not reach."""
    torch.manual_seed(0)
    model, x = _Position(), torch.randn(5, 4, 3)
    engine = Engine(model, batch_dim=0)
    for _ in range(2):  # where the samples are is shown by passes that keep the graph
        losses = model(x)
        engine.backward(losses, lambda gramian: torch.ones(len(gramian)))
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()
    found = [p.grad / 2 for p in model.parameters() if p.grad is not None]
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_small_parameters_have_memory_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    Engine(model, batch_dim=0).backward(model(randn(3, 4)).sum(1), lambda g: g.diagonal())
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().nbytes() == p.grad.numel() * p.grad.itemsize


def test_a_thread_does_not_wait_for_the_passes_of_another() -> None:
    began, ended = Event(), Event()

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            began.set()
            assert ended.wait(20), "the other thread could not make its step"
            return grad.clone()

    slow, model = nn.Linear(6, 3), nn.Linear(6, 3)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(Engine(slow, batch_dim=0).compute_gramian, Waiting.apply(_one(slow)))
        assert began.wait(20)
        Engine(model, batch_dim=0).compute_gramian(_one(model))
        ended.set()
        step.result()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rows_that_cancel_are_multiplied_in_float64_in_any_thread(
    elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each accelerator has a thread of its own, in which hooks run."""
    if elsewhere:
        original = _passes.differentiate

        def in_a_thread(*arguments: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(original, *arguments).result()

        monkeypatch.setattr(_passes, "differentiate", in_a_thread)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 80, bias=False)
    ).float()
    x, mixture = torch.randn(4, 64, dtype=torch.float32), torch.randn(80, dtype=torch.float32)
    x[1] = -x[0] + 3e-6 * torch.randn(64, dtype=torch.float32)
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.ones(4)

    # Nothing is kept for a second pass, so the first one is repeated as a whole.
    Engine(model, batch_dim=0).backward(model(x) @ mixture, weighting, second_pass=True)
    [gramian] = seen
    jacobian = explicit_jacobian(model(x) @ mixture, list(model.parameters())).double()
    scale = jacobian.norm(dim=1)
    smallest = [
        float(torch.linalg.eigvalsh(g.double() / scale / scale[:, None])[0])
        for g in (gramian, jacobian @ jacobian.T)
    ]
    assert abs(smallest[0] - smallest[1]) < 1e-12


class Hiding(nn.Sequential):
    """A module that does not tell all of its parameters."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter([*super().named_parameters(*args, **kwargs)][1:])


def test_the_parameters_are_those_that_modules_tell() -> None:
    shared = nn.Linear(2, 1).double()
    losses = shared(randn(3, 2)).squeeze(1)
    jacobian = explicit_jacobian(losses, [shared.weight, shared.bias])
    # The bias alone, and each parameter once.
    for modules, rows in (([Hiding(shared)], jacobian[:, 2:]), ([shared, shared], jacobian)):
        gramian = Engine(*modules, batch_dim=0).compute_gramian(losses)
        assert relative_error(gramian, rows @ rows.T) < 1e-12


def test_no_class_that_was_made_for_one_step_is_kept() -> None:
    classes: list[ref[type]] = []
    model = nn.Linear(2, 2)

    def step() -> None:
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x * 2

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return grads[0] * 2

        class Layers(nn.Sequential):
            pass

        layers = Layers(model)
        losses = Scale.apply(layers(randn(3, 2))).square().sum(1)
        Engine(layers, batch_dim=0).backward(losses, lambda g: g.new_ones(3))
        classes.extend([ref(Scale), ref(Layers)])

    step()
    gc.collect()
    assert [known() for known in classes] == [None, None]


def test_the_plan_that_was_not_used_for_longest_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[int] = []
    original = _plan.find_layouts

    def noting(graph: Graph, output: Tensor, batch_dim: int) -> Any:
        searched.append(len(output))
        return original(graph, output, batch_dim)

    monkeypatch.setattr(_plan, "find_layouts", noting)
    monkeypatch.setattr(_plan, "_KINDS", 3)
    model = nn.Linear(2, 1)
    engine = Engine(model, batch_dim=0)
    for samples in (2, 2, 3, 2, 4, 2, 5, 2):
        engine.compute_gramian(model(randn(samples, 2)).squeeze(1))
    assert searched == [2, 3, 4, 5]


def _perceptron(layers: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(6, 6), nn.Tanh())))


def _encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 6), encoder, nn.Flatten())


@pytest.mark.parametrize(
    ("make", "budget", "limit"),
    [(_perceptron, None, 17), (_perceptron, 256 << 20, 17), (_encoder, 256 << 20, 130)],
)
def test_a_layer_costs_few_calls(
    make: Callable[[int], nn.Module], budget: int | None, limit: int
) -> None:
    """Functions of this library that a step calls; layers of one form come together."""

    def calls(layers: int) -> int:
        model = make(layers)
        engine = Engine(model, batch_dim=0, memory_budget=budget)
        count = 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            inside = frame.f_globals.get("__name__", "").startswith("jdcore.")
            count += event == "call" and inside

        for _ in range(3):  # plans, and what the first steps find out, are there at last
            losses, count = _one(model), 0
            sys.setprofile(profile)
            try:
                engine.backward(losses, lambda gramian: gramian.diagonal())
            finally:
                sys.setprofile(None)
            model.zero_grad()
        return count

    assert calls(16) - calls(4) <= 12 * limit
