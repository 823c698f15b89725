"""Training loops as they are written: some steps, beside rows by one plain backward pass each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jdcore import ParameterError
from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine
from jdcore.autojac import _taps, _vmap, backward, gramian_backward, jac, jac_to_grad, mtl_backward
from jdcore.errors import GraphError, SinglePassError, VectorizationError
from tests.functions import Redone, RedoneOnTheParameter

STEPS = 3
Losses = Callable[[nn.Module], "list[Tensor] | Tensor"]


def _by_norm(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


def _list(losses: list[Tensor] | Tensor) -> list[Tensor]:
    return list(losses) if isinstance(losses, list) else list(losses.unbind())


def _plain_step(model: nn.Module, losses: Losses, parameters: list[nn.Parameter]) -> None:
    """Rows from one forward and one backward pass for each loss."""
    rows = []
    for k in range(len(_list(losses(model)))):
        model.zero_grad()
        _list(losses(model))[k].backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        rows.append(torch.cat([gradient.flatten() for gradient in grads]))
    matrix = torch.stack(rows)
    update = _by_norm(matrix @ matrix.T) @ matrix
    pieces = update.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()


def _our_step(model: nn.Module, losses: Losses, parameters: list[nn.Parameter]) -> None:
    model.zero_grad()
    backward(losses(model), inputs=parameters)
    jac_to_grad(parameters, GramianAggregator(_by_norm))


def trains_as_plain_rows(
    model: nn.Module,
    losses: Losses,
    step: Callable[[nn.Module, Losses, list[nn.Parameter]], None] = _our_step,
) -> None:
    results = []
    for one_step in (_plain_step, step):
        trained = copy.deepcopy(model)
        parameters = list(trained.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(STEPS):
            one_step(trained, losses, parameters)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    for got, expected, before in zip(*results[::-1], model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        assert not torch.equal(got, before)


X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)


# -- functions that differentiate in their own backward --------------------------------------------


class _Redoing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return RedoneOnTheParameter.apply(x, self.w).sin()


class _Adjoint(torch.autograd.Function):
    """Euler steps of z' = f(z), whose backward goes through them again from the end."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, z: Tensor, *parameters: Tensor) -> Tensor:
        states = [z]
        with torch.no_grad():
            for _ in range(4):
                states.append(states[-1] + 0.1 * f(states[-1]))
        ctx.f = f
        ctx.save_for_backward(*states, *parameters)
        return states[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, parameters = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        sums = [torch.zeros_like(p) for p in parameters]
        for state in reversed(states[:-1]):
            with torch.enable_grad():
                start = state.detach().requires_grad_()
                end = start + 0.1 * ctx.f(start)
            gradient, *found = torch.autograd.grad(end, (start, *parameters), gradient)
            sums = [total + part for total, part in zip(sums, found, strict=True)]
        return None, gradient, *sums


class _Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3).double()
        self.f = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        return _Adjoint.apply(self.f, self.before(x), *self.f.parameters())


class _Equilibrium(nn.Module):
    """A fixed point z = tanh(A z + x), differentiated by a hook that solves for its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        self.outer = nn.Linear(3, 3).double()
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = (self.inner(z) + x).tanh()
        z = (self.inner(z) + x).tanh()
        start = z.detach().requires_grad_()
        f = (self.inner(start) + x.detach()).tanh()

        def solve(gradient: Tensor) -> Tensor:
            y = gradient
            for _ in range(60):
                y = torch.autograd.grad(f, start, y, retain_graph=True)[0] + gradient
            return y

        z.register_hook(solve)
        return z


class _Outer(torch.autograd.Function):
    """sin(sin(x * w)), whose backward passes through a function that differentiates in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x * w).sin().sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = Redone.apply(x, w).sin().sin()
        gx, gw = torch.autograd.grad(result, (x, w), gradient)
        return gx, gw


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3).double()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return _Outer.apply(self.before(x), self.w)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("make", [_Redoing, _Flow, _Equilibrium, _Nested])
def test_functions_that_differentiate_in_their_own_backward(
    make: type[nn.Module], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # as if their leaves were, which are listened to
        monkeypatch.setattr(_taps, "_WORTH_A_HOOK", 0)
    trains_as_plain_rows(make(), lambda model: [(model(X) - k).square().mean() for k in range(3)])
    trains_as_plain_rows(make(), lambda model: (model(X) - 2.0).square().mean(dim=0))


@pytest.mark.parametrize("size", [3, 300])
def test_a_large_leaf_does_not_hear_passes_inside_its_own(size: int) -> None:
    w = torch.randn(size, 300, dtype=torch.float64, requires_grad=True)
    x = torch.full_like(w, 3.0)
    losses = [RedoneOnTheParameter.apply(x, w).sum(), (RedoneOnTheParameter.apply(x, w) * w).sum()]
    [rows] = jac(losses, w)
    torch.testing.assert_close(rows, torch.stack([x, 2 * x * w.detach()]))


def test_a_function_that_keeps_something_called_variable_is_no_leaf() -> None:
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.variable = x.detach() * 2.0
            return x * ctx.variable

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.variable * 2.0

    a = torch.tensor([1.0, 2.0], requires_grad=True)
    backward(Named.apply(a * 1.0))
    assert a.jac.tolist() == [[4.0, 0.0], [0.0, 8.0]]


# -- functions that hide their parameters ----------------------------------------------------------


class _ReversibleFunction(torch.autograd.Function):
    """Coupled blocks; backward makes the inputs anew and accumulates into the parameters."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> Any:
        with torch.no_grad():
            c = a + f(b)
            d = b + g(c)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(c, d)
        return c, d

    @staticmethod
    def backward(ctx: Any, to_c: Tensor, to_d: Tensor) -> tuple[Tensor, Tensor, None, None]:
        c, d = ctx.saved_tensors
        with torch.enable_grad():
            middle = c.detach().requires_grad_()
            shift = ctx.g(middle)
        shift.backward(to_d)
        to_c = to_c + middle.grad
        with torch.enable_grad():
            start = (d.detach() - shift.detach()).requires_grad_()
            shift = ctx.f(start)
        shift.backward(to_c)
        return to_c, to_d + start.grad, None, None


class _Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 4).double()
        self.f = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
        self.g = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.before(x).chunk(2, dim=1)
        return torch.cat(_ReversibleFunction.apply(a, b, self.f, self.g), dim=1)


def _two_losses(model: nn.Module) -> list[Tensor]:
    y = model(X)
    return [y.square().mean(), (y - 1.0).abs().mean()]


def test_reversible_blocks_train_if_their_parameters_are_given() -> None:
    trains_as_plain_rows(_Reversible(), _two_losses)
    trains_as_plain_rows(_Reversible(), lambda model: model(X).square().mean(dim=0))


def test_reversible_blocks_are_refused_where_their_parameters_are_missing() -> None:
    model = _Reversible()
    kept = torch.ones_like(model.f[0].weight)
    model.f[0].weight.grad = kept
    calls = []
    model.g[0].weight.register_post_accumulate_grad_hook(calls.append)
    for refused in (
        lambda: backward(_two_losses(model)),
        lambda: backward(_two_losses(model), inputs=model.before.parameters()),
        lambda: jac(_two_losses(model), model.before.weight),
        lambda: backward(_two_losses(model), parallel_chunk_size=2),
    ):
        with pytest.raises((ParameterError, VectorizationError)):
            refused()
    assert model.f[0].weight.grad is kept
    assert kept.eq(1.0).all()
    assert not calls
    assert all(parameter.grad is None for parameter in model.g.parameters())
    assert not any(hasattr(parameter, "jac") for parameter in model.parameters())


def test_a_function_that_keeps_its_parameters_out_of_sight_is_refused_before_a_jac_is_written() -> (
    None
):
    w = torch.ones(2, requires_grad=True)

    class Secret(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * w.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                (w * 1.0).backward(gradient)
            return gradient

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(GraphError, match=r"accumulates into the .grad of a .* shape \[2\]"):
        backward(Secret.apply(x).sum(), inputs=[x, w])
    # The pass itself cannot be undone for what is not watched, but here w was given.
    assert w.grad is None
    assert not hasattr(x, "jac")


def test_a_hook_that_accumulates_is_refused() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    hidden = x * 1.0

    def accumulate(gradient: Tensor) -> None:
        with torch.enable_grad():
            w.sum().backward()

    hidden.register_hook(accumulate)
    with pytest.raises(GraphError, match="accumulates into the"):
        backward((hidden * w).sum())
    assert w.grad is None
    assert not hasattr(w, "jac")


def test_a_head_behind_a_reversible_trunk() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = _Reversible()
            self.heads = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(2))

    def losses(net: nn.Module) -> list[Tensor]:
        features = net.trunk(X)
        return [head(features).square().mean() for head in net.heads]

    model = Net()
    expected = copy.deepcopy(model)
    for _ in range(STEPS):
        model.zero_grad()
        expected.zero_grad()
        for k in range(2):
            losses(expected)[k].backward()
        features = model.trunk(X)
        mtl_backward(
            [head(features).square().mean() for head in model.heads],
            features,
            shared_params=model.trunk.parameters(),
        )
        jac_to_grad(model.trunk.parameters(), lambda matrix: matrix.sum(dim=0))
        for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad)
            with torch.no_grad():
                got.sub_(got.grad, alpha=0.1)
                wanted.sub_(wanted.grad, alpha=0.1)


class _Checkpointed(nn.Module):
    """A trunk, and heads inside of reentrant checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)
        )

    def losses(self) -> tuple[list[Tensor], Tensor]:
        features = self.trunk(X)
        outputs = [checkpoint(head, features, use_reentrant=True) for head in self.heads]
        return [(y - 1.0).square().mean() for y in outputs], features


def test_reentrant_checkpoints_in_heads() -> None:
    def step(model: nn.Module, losses: Losses, parameters: list[nn.Parameter]) -> None:
        model.zero_grad()
        tasks_params = [list(head.parameters()) for head in model.heads]
        mtl_backward(*model.losses(), tasks_params=tasks_params)
        jac_to_grad(model.trunk.parameters(), GramianAggregator(_by_norm))

    torch.manual_seed(3)
    model = _Checkpointed()
    plain = copy.deepcopy(model)
    for _ in range(STEPS):
        step(model, None, [])
        rows = []
        for parameter in plain.parameters():
            parameter.grad = None
        for k in range(2):
            for parameter in plain.trunk.parameters():
                parameter.grad = None
            plain.losses()[0][k].backward()
            rows.append(torch.cat([p.grad.flatten() for p in plain.trunk.parameters()]))
        matrix = torch.stack(rows)
        pieces = (_by_norm(matrix @ matrix.T) @ matrix).split(
            [p.numel() for p in plain.trunk.parameters()]
        )
        for parameter, piece in zip(plain.trunk.parameters(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
            with torch.no_grad():
                got.sub_(got.grad, alpha=0.1)
                expected.sub_(expected.grad, alpha=0.1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # in the outer one
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_checkpoints_inside_of_checkpoints(outer: bool, inner: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def within(self, x: Tensor) -> Tensor:
            return checkpoint(lambda h: self.second(h.sin()), 2.0 * x, use_reentrant=inner)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.within, self.first(x), use_reentrant=outer).tanh()

    trains_as_plain_rows(Net(), lambda model: [(model(X) - k).square().mean() for k in range(3)])


def test_reentrant_checkpoints_in_heads_need_the_parameters_of_the_tasks() -> None:
    with pytest.raises(ParameterError, match="`tasks_params` must be given"):
        mtl_backward(*_Checkpointed().losses())


def test_a_reentrant_checkpoint_runs_hooks_after_accumulation_once_per_step(
    register: Callable[..., Any],
) -> None:
    layer = nn.Linear(3, 3).double()
    calls: list[Tensor] = []
    for parameter in layer.parameters():
        register(parameter, calls.append)
    y = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=True)
    backward([y.sum(), y.square().sum(), y.exp().sum()], inputs=layer.parameters())
    assert not calls
    jac_to_grad(layer.parameters(), lambda matrix: matrix.sum(dim=0))
    assert calls == list(layer.parameters())


def test_an_intermediate_input_before_a_reentrant_checkpoint_gets_its_rows() -> None:
    layer = nn.Linear(3, 3).double()
    hidden = X.clone().requires_grad_() * 2.0
    y = checkpoint(layer, hidden, use_reentrant=True)
    losses = [y.sum(), y.square().sum()]
    got = jac(losses, [hidden, layer.weight])
    plain = layer(hidden)
    for k, loss in enumerate([plain.sum(), plain.square().sum()]):
        expected = torch.autograd.grad(loss, [hidden, layer.weight], retain_graph=True)
        for jacobian, row in zip(got, expected, strict=True):
            torch.testing.assert_close(jacobian[k], row)


def test_optimizers_that_step_in_hooks_make_the_steps_of_one_that_steps_behind(
    register: Callable[..., Any],
) -> None:
    def losses(model: nn.Module) -> tuple[list[Tensor], Tensor]:
        features = model.trunk(X)
        return [(head(features) - 1.0).square().mean() for head in model.heads], features

    def train(model: nn.Module, optimizers: dict[Tensor, torch.optim.Optimizer]) -> None:
        for _ in range(STEPS):
            mtl_backward(*losses(model))
            jac_to_grad(model.trunk.parameters(), GramianAggregator(_by_norm))
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()

    torch.manual_seed(0)
    behind = _Checkpointed()
    inside = copy.deepcopy(behind)
    ours, others = ({p: torch.optim.Adam([p]) for p in m.parameters()} for m in (inside, behind))

    def step(parameter: Tensor) -> None:
        ours[parameter].step()
        parameter.grad = None  # as is done to save memory

    for parameter in ours:
        register(parameter, step)
    train(inside, {})
    train(behind, others)
    for got, expected in zip(inside.parameters(), behind.parameters(), strict=True):
        assert torch.equal(got, expected)
        assert got.grad is None


# -- modes -----------------------------------------------------------------------------------------


def test_a_step_inside_of_autocast_loses_no_digits() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        backward([1e-8 * w.sum(), 1e-8 * (w**2).sum()])
        jac_to_grad(w, lambda matrix: matrix.new_full((2,), 0.5) @ matrix)
    torch.testing.assert_close(w.grad, torch.tensor([1.5e-8, 2.5e-8]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("way", ["jac", "mtl"])
def test_autocast_around_the_whole_step_gives_the_rows_of_passes_outside(way: str) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(8, 6), [nn.Linear(6, 1) for _ in range(2)]
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        features = trunk(x)
        losses = [head(features).float().square().mean() * 1e3 for head in heads]
        parameters = list(trunk.parameters())
        if way == "jac":
            backward(losses, inputs=parameters, retain_graph=True)
        else:
            mtl_backward(losses, features, retain_graph=True)
        got = [parameter.jac for parameter in parameters]
        jac_to_grad(parameters, GramianAggregator(_by_norm))
    for k, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for jacobian, row in zip(got, expected, strict=True):
            torch.testing.assert_close(jacobian[k], row, rtol=0.0, atol=0.0)
    matrix = torch.cat([jacobian.flatten(1) for jacobian in got], dim=1).double()
    update = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
    expected_update = _by_norm(matrix @ matrix.T) @ matrix
    torch.testing.assert_close(update, expected_update, rtol=1e-5, atol=1e-6)


def test_a_training_inside_of_autocast_makes_the_steps_of_rows_outside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    parameters, x = list(model.parameters()), torch.randn(5, 8)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            losses = (model(x).float() - 1.0).square().mean(dim=0)
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        expected = _by_norm(matrix @ matrix.T) @ matrix
        with torch.autocast("cpu", torch.bfloat16):
            backward((model(x).float() - 1.0).square().mean(dim=0))
            jac_to_grad(parameters, GramianAggregator(_by_norm))
        update = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.testing.assert_close(update.double(), expected, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad, alpha=0.1)
        model.zero_grad()


def test_a_training_with_a_scaler_inside_of_autocast_makes_the_steps_of_rows_outside() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    plain, x = copy.deepcopy(ours), torch.randn(5, 8)
    for _ in range(STEPS):
        for model in (ours, plain):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with torch.autocast("cpu", torch.float16):
                losses = scaler.scale((model(x).float() - 1.0).square().mean(dim=0))
                if model is ours:
                    backward(losses)
                    jac_to_grad(model.parameters(), lambda matrix: matrix.sum(dim=0))
            if model is plain:
                for loss in losses:
                    loss.backward(retain_graph=True)
            scaler.step(optimizer)
            optimizer.zero_grad()
    for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [lambda p: torch.zeros(()).double().expand_as(p), torch.zeros])
def test_a_training_goes_on_where_a_grad_that_cannot_be_added_to_was_refused(make: Any) -> None:
    def step(model: nn.Module, losses: Losses, parameters: list[nn.Parameter]) -> None:
        model.zero_grad()
        last = parameters[-1]
        if make is torch.zeros:
            with torch.inference_mode():
                last.grad = torch.zeros_like(last)
        else:
            last.grad = make(last)
        backward(losses(model), inputs=parameters)
        with pytest.raises(ParameterError, match="that can be added to"):
            jac_to_grad(parameters, GramianAggregator(_by_norm))
        assert all(parameter.grad is None for parameter in parameters[:-1])
        last.grad = None
        jac_to_grad(parameters, GramianAggregator(_by_norm))

    trains_as_plain_rows(_net(), lambda model: model(X).square().mean(dim=0), step)


def test_gradients_made_in_inference_mode_can_be_added_to_later() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = w.square()
    with torch.inference_mode():
        backward(losses)
        jac_to_grad(w, lambda matrix: matrix.sum(dim=0))
    backward(w.square())
    jac_to_grad(w, lambda matrix: matrix.sum(dim=0))
    assert w.grad.tolist() == [4.0, 8.0]


# -- hooks -----------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def _quiet() -> Iterator[None]:
    from jdcore.autojac import _vmap

    _vmap._WORKED.clear()
    _vmap._FAILED.clear()
    yield
    _vmap._WORKED.clear()
    _vmap._FAILED.clear()


class _Scaled(nn.Module):
    """A network whose parameters get at their gradients in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = _net(), nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, hear: Callable[[Tensor], None]) -> Tensor:
        hidden = self.net[0](X) * self.scale
        hear(hidden)
        return self.net[2](self.net[1](hidden)).square().mean(dim=0)


def _mtl(model: nn.Module, hear: Callable[[Tensor], None], m: int) -> None:
    hidden = model.net[0](X) * model.scale
    hear(hidden)
    heads = [nn.Linear(4, 1).double() for _ in range(m)]
    for head in heads:
        hear(head.weight)
    mtl_backward([head(hidden.tanh()).square().mean() for head in heads], hidden)
    assert all(head.weight.grad is not None for head in heads)
    assert not any(head.weight.grad.data_ptr() in _ADDRESSES for head in heads)
    jac_to_grad([model.net[0].weight, model.net[0].bias, model.scale], GramianAggregator(_by_norm))


_ADDRESSES: set[int] = set()


def _hand_out_a_buffer(tensor: Tensor) -> None:
    """Hook that copies each gradient into one buffer, and returns that."""
    buffer = torch.empty_like(tensor, requires_grad=False)
    _ADDRESSES.add(buffer.data_ptr())
    tensor.register_hook(buffer.copy_)


_WAYS: dict[str, Callable[[_Scaled, Callable[[Tensor], None]], object]] = {
    "backward": lambda model, hear: (
        backward(model(hear)),
        jac_to_grad(model.parameters(), GramianAggregator(_by_norm)),
    ),
    "few heads": lambda model, hear: _mtl(model, hear, 2),
    "many heads": lambda model, hear: _mtl(model, hear, 5),
    "gramian_backward": lambda model, hear: gramian_backward(list(model(hear)), _by_norm),
    "engine": lambda model, hear: Engine(model, batch_dim=0).backward(model(hear), _by_norm),
    "engine, second pass": lambda model, hear: Engine(model, batch_dim=None).backward(
        model(hear), _by_norm, second_pass=True
    ),
}


@pytest.mark.filterwarnings("ignore::jdcore.errors.JDCoreWarning")
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("inner", [False, True])
def test_a_hook_may_hand_out_the_same_buffer_for_each_gradient(way: str, inner: bool) -> None:
    _ADDRESSES.clear()
    torch.manual_seed(2)
    plain = _Scaled()
    heard = copy.deepcopy(plain)
    for parameter in heard.parameters():
        _hand_out_a_buffer(parameter)
    torch.manual_seed(3)
    _WAYS[way](plain, lambda tensor: None)
    torch.manual_seed(3)
    _WAYS[way](heard, _hand_out_a_buffer if inner else lambda tensor: None)
    for got, expected in zip(heard.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad)
            assert got.grad.data_ptr() not in _ADDRESSES


class _Buffered(torch.autograd.Function):
    """Twice its argument; like captured graphs, its backward fills the same memory each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.mul(gradient, 2.0, out=ctx.buffer), None


@pytest.mark.filterwarnings("ignore::jdcore.errors.JDCoreWarning")
@pytest.mark.parametrize("way", ["backward", "gramian_backward", "tasks", "samples"])
def test_a_function_may_hand_out_the_same_buffer_for_each_gradient(way: str) -> None:
    layer = nn.Linear(3, 4).double()
    weight, hidden = torch.empty(4, 3).double(), torch.empty(4, 4).double()

    def losses() -> Tensor:
        h = nn.functional.linear(X, _Buffered.apply(layer.weight, weight), layer.bias)
        return _Buffered.apply(h, hidden).square().sum(dim=1)

    rows = [torch.autograd.grad(losses()[k], layer.weight)[0].clone() for k in range(len(X))]
    expected = torch.stack(rows).flatten(1)
    expected = _by_norm(expected @ expected.T) @ expected
    if way == "backward":
        backward(losses(), inputs=layer.weight)
        jac_to_grad(layer.weight, GramianAggregator(_by_norm))
    elif way == "gramian_backward":
        gramian_backward(list(losses()), _by_norm, inputs=layer.weight)
    else:
        layer.bias.requires_grad_(False)
        engine = Engine(layer, batch_dim=0 if way == "samples" else None)
        engine.backward(losses(), _by_norm)
    torch.testing.assert_close(layer.weight.grad.flatten(), expected)


@pytest.mark.parametrize("way", ["backward", "tasks", "samples", "tasks of samples"])
def test_a_function_may_hand_out_the_same_buffer_several_times_in_a_pass(way: str) -> None:
    # Wide layers have rows that are made from the gradients at their products.
    layers = [nn.Linear(256, 256, bias=False).double() for _ in range(3)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    inputs, buffer = X.repeat_interleave(86, 1)[:, :256], torch.empty(4, 256).double()

    def losses() -> Tensor:
        first, second = (_Buffered.apply(layer(inputs), buffer) for layer in layers[:2])
        found = _Buffered.apply(layers[2](first * second), buffer)
        return found[:, :2].T if way == "tasks of samples" else found.square().sum(dim=1)

    rows = []
    for loss in losses().flatten():
        loss.backward(retain_graph=True)
        rows.append([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    if way == "backward":
        backward(losses(), inputs=parameters)
        for parameter, of_parameter in zip(parameters, zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(parameter.jac, torch.stack(of_parameter))
        return
    matrix = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    batch_dim = {"tasks": None, "samples": 0, "tasks of samples": 1}[way]
    found = Engine(*layers, batch_dim=batch_dim).compute_gramian(losses())
    if found.ndim == 4:
        found = found.transpose(2, 3).reshape(8, 8)
    torch.testing.assert_close(found, matrix @ matrix.T)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("second_pass", [False, True])
def test_what_a_function_hands_out_again_is_no_gradient_of_small_batches(
    batch_dim: int | None, second_pass: bool
) -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    buffer = torch.empty(3, 3).double()
    engine, expected = Engine(layer, batch_dim=batch_dim), torch.zeros(3, 3).double()
    for scale in (1.0, 3.0, 2.0):
        inputs = scale * X
        losses = nn.functional.linear(inputs, _Buffered.apply(layer.weight, buffer)).square()
        losses = losses.sum(dim=1 if batch_dim == 0 else 0)
        rows = [
            torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].clone() for loss in losses
        ]
        weights = engine.backward(losses, _by_norm, second_pass=second_pass)
        expected += torch.einsum("i,ijk->jk", weights, torch.stack(rows))
        torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.filterwarnings("ignore::jdcore.errors.VectorizationWarning")
@pytest.mark.usefixtures("_quiet")
def test_hooks_that_read_values_and_tensors_that_retain_their_gradient() -> None:
    norms: list[float] = []

    def losses(model: nn.Module) -> Tensor:
        hidden = model[0](X)
        hidden.register_hook(lambda gradient: norms.append(gradient.norm().item()))
        hidden.retain_grad()
        return model[2](model[1](hidden)).square().mean(dim=0)

    trains_as_plain_rows(_net(), losses)
    assert len(norms) >= 2 * 3 * STEPS


@pytest.mark.usefixtures("_quiet")
def test_a_hook_that_reads_values_may_come_later() -> None:
    model, norms = _net(), []

    def step(hook: bool) -> None:
        hidden = model[0](X)
        if hook:
            hidden.register_hook(lambda gradient: norms.append(gradient.norm().item()))
        backward(model[2](model[1](hidden)).square().mean(dim=0))

    step(hook=False)
    step(hook=False)
    step(hook=True)
    step(hook=True)
    assert len(norms) == 6


@pytest.mark.parametrize("size", [2, 70_000])
def test_none_that_a_custom_function_passes_on_is_no_row(size: int) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    w, v = torch.ones(size, requires_grad=True), torch.ones(size, requires_grad=True)
    backward([(Stop.apply(w) * v).sum(), (w * v).sum()])
    assert w.jac[0].eq(0.0).all()
    assert w.jac[1].eq(1.0).all()
    assert v.jac.eq(1.0).all()


# -- compiled models -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_that_donates_its_buffers_says_what_to_do() -> None:
    model = _net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X).sum().backward()
    with pytest.raises(SinglePassError, match=r"donated_buffer = False"):
        backward(compiled(X).square().mean(dim=0))
    assert not any(hasattr(parameter, "jac") for parameter in model.parameters())
    backward(compiled(X).square().mean())  # one pass suffices
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains() -> None:
    torch._dynamo.reset()
    compiled: dict[nn.Module, Any] = {}

    def losses(model: nn.Module) -> Tensor:
        if model not in compiled:
            compiled[model] = torch.compile(model, backend="aot_eager")
        return compiled[model](X).square().mean(dim=0)

    import torch._functorch.config as config

    before = config.donated_buffer
    config.donated_buffer = False
    try:
        trains_as_plain_rows(_net(), losses)
    finally:
        config.donated_buffer = before
        torch._dynamo.reset()


class _Counting(nn.Module):
    """Notes how often all gradients of its parameters are there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3, width).double(), nn.Linear(width, 2).double()
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh())

    def note(self) -> Any:
        def noted(gradients: Any) -> None:
            assert all(gradient is not None for gradient in gradients)
            self.times += 1

        return torch.autograd.graph.register_multi_grad_hook(list(self.parameters()), noted)


def _with_hook(model: nn.Module) -> list[Tensor]:
    y = model(X)
    return [y.square().mean(), y.exp().mean()]


@pytest.mark.parametrize("width", [5, 30_000])  # small, and worth hooks of ours
def test_hooks_for_several_leaves_hear_each_row(width: int) -> None:
    torch.manual_seed(0)
    model = _Counting(width)
    rows = jac(_with_hook(model), list(model.parameters()))
    handle = model.note()
    found = jac(_with_hook(model), list(model.parameters()))
    assert model.times == 2

    features = model.trunk(X).tanh()
    y = model.head(features)
    mtl_backward([y.square().mean(), y.exp().mean()], features)
    handle.remove()

    for got, expected in zip(found, rows, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert model.times == 4
    for parameter, expected in zip(model.trunk.parameters(), rows, strict=False):
        torch.testing.assert_close(parameter.jac, expected, rtol=1e-12, atol=1e-14)
    for parameter, expected in zip(model.head.parameters(), rows[2:], strict=True):
        torch.testing.assert_close(parameter.grad, expected.sum(0), rtol=1e-12, atol=1e-14)


# -- threads ---------------------------------------------------------------------------------------


class _Pausing(torch.autograd.Function):
    """Lets somebody else run in the middle of a backward pass."""

    generate_vmap_rule = True
    pause: Callable[[], None] = staticmethod(lambda: None)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Pausing.pause()
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_rows_that_another_thread_batches_are_not_taken_for_left_behind(
    chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _vmap._WORKED.clear()
    started, go_on = threading.Event(), threading.Event()
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    others: list[tuple[Tensor, ...]] = []

    def pause() -> None:
        started.set()
        assert go_on.wait(60.0)

    monkeypatch.setattr(_Pausing, "pause", staticmethod(pause))
    v = torch.linspace(0.0, 1.0, 3, dtype=torch.float64, requires_grad=True)
    pausing = _Pausing.apply(v)  # type: ignore[no-untyped-call]
    other = threading.Thread(target=lambda: others.append(jac(pausing, parallel_chunk_size=3)))
    other.start()
    assert started.wait(60.0)
    try:
        (found,) = jac(w.square(), parallel_chunk_size=chunk_size)
    finally:
        go_on.set()
        other.join()

    assert torch.equal(found, 2.0 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(others[0][0], v.detach().cos().diag())
