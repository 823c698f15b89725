"""What others hang on a graph: gradients that are retained, and hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from jdcore import RowByRowWarning, autogram
from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward
from jdcore.errors import UnservedGraphError
from jdcore.graph._nesting import OuterPass
from jdcore.linalg import gramian
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error

B = 4


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _right(engine: Engine, losses: Tensor, net: nn.Module) -> None:
    rows = explicit_jacobian(losses, list(net.parameters()))
    assert relative_error(engine.compute_gramian(losses).reshape(len(rows), -1), rows @ rows.T) < (
        1e-12
    )


# -- retain_grad -----------------------------------------------------------------------------------


def _with_retained(net: nn.Sequential) -> tuple[list[Tensor], Tensor]:
    """Results of a layer, of an activation and of a view, and losses [B]."""
    first = net[0](randn(B, 3))
    second = net[1](first)
    third = net[2](second).mT
    for tensor in (first, second, third):
        tensor.retain_grad()
    return [first, second, third], third.square().sum(0)


def _without_weighing(gramian: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, len(gramian))


WAYS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "samples": lambda net, losses: Engine(net, batch_dim=0).backward(losses, _without_weighing),
    "tasks": lambda net, losses: Engine(net, batch_dim=None).backward(losses, _without_weighing),
    "a second pass": lambda net, losses: Engine(net, batch_dim=0).backward(
        losses, _without_weighing, second_pass=True
    ),
    "a part of the model": lambda net, losses: Engine(net[0], batch_dim=0).backward(
        losses, _without_weighing
    ),
    "a function": lambda _, losses: autogram.backward(losses, _without_weighing, batch_dim=0),
    "without a Gramian": lambda _, losses: gramian_backward(losses, _without_weighing),
}


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_retains_its_gradient_gets_that_of_the_weighted_losses(
    way: str, present: bool
) -> None:
    net = _net()
    expected, losses = _with_retained(net)
    losses.backward(_without_weighing(losses))
    retained, losses = _with_retained(net)
    if present:
        for tensor in retained:
            tensor.grad = torch.ones_like(tensor)
    WAYS[way](net, losses)
    for tensor, right in zip(retained, expected, strict=True):
        assert relative_error(tensor.grad - float(present), right.grad) < 1e-12


LOOKS: dict[str, Callable[[Engine, Tensor], object]] = {
    "gramian": Engine.compute_gramian,
    "explain": Engine.explain,
    "verify": Engine.verify,
}


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("look", LOOKS)
def test_what_retains_its_gradient_stays_as_it_is_if_none_is_written(
    look: str, batch_dim: int | None
) -> None:
    net = _net()
    engine = Engine(net, batch_dim=batch_dim)
    for _ in range(2):
        (first, second, third), losses = _with_retained(net)
        second.grad = kept = torch.ones_like(second)
        LOOKS[look](engine, losses)
        assert first.grad is None
        assert second.grad is kept
        assert torch.equal(kept, torch.ones_like(second))
        assert third.grad is None


def test_what_was_written_to_after_it_retained_its_gradient() -> None:
    net = _net()
    engine = Engine(net, batch_dim=0)
    hidden = net[0](randn(B, 3))
    hidden.retain_grad()
    hidden.mul_(2.0)
    losses = net[2](hidden).sum(1)
    engine.compute_gramian(losses)
    assert hidden.grad is None
    engine.backward(losses, _without_weighing)
    expected = _without_weighing(losses)[:, None] * net[2].weight.detach().sum(0)
    assert relative_error(hidden.grad, expected) < 1e-12


# -- hooks -----------------------------------------------------------------------------------------


def _ignore(*_: object) -> None:
    pass


def _on_a_module(net: nn.Sequential) -> None:
    net[1].register_forward_hook(_ignore)


def _on_all_modules(_: nn.Sequential) -> None:
    nn.modules.module.register_module_forward_hook(_ignore).remove()


def _on_an_optimizer(net: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(_ignore)
    net.optimizer = [optimizer]  # not a module


def _on_a_parameter(net: nn.Sequential) -> None:
    net[0].weight.register_hook(_ignore)


def _behind_a_parameter(net: nn.Sequential) -> None:
    net[0].weight.register_post_accumulate_grad_hook(_ignore)


def _on_the_accumulator_of_a_parameter(net: nn.Sequential) -> None:
    net.accumulator = get_gradient_edge(net[0].weight).node  # else it goes, and its hooks
    net.accumulator.register_hook(_ignore)


def _removed(net: nn.Sequential) -> None:
    net(randn(B, 3)).register_hook(_ignore).remove()


def _on_another_graph_that_is_gone(net: nn.Sequential) -> None:
    net(randn(B, 3)).sum().grad_fn.register_hook(_ignore)


HARMLESS = [
    _on_a_module,
    _on_all_modules,
    _on_an_optimizer,
    _on_a_parameter,
    _behind_a_parameter,
    _on_the_accumulator_of_a_parameter,
    _removed,
    _on_another_graph_that_is_gone,
]


@pytest.mark.parametrize("hook", HARMLESS)
def test_hooks_elsewhere_do_no_harm(hook: Callable[[nn.Sequential], None]) -> None:
    net = _net()
    engine = Engine(net, batch_dim=0)
    losses = net(randn(B, 3)).sum(1)
    hook(net)
    _right(engine, losses, net)  # and does not warn
    assert "backward pass of its own" not in engine.explain(losses)


def _on_an_activation(hidden: Tensor) -> None:
    hidden.register_hook(lambda g: g.flip(0) + g)


def _by_a_function_of_ours(hidden: Tensor) -> None:
    hidden.register_hook(gramian)


def _on_an_operation(hidden: Tensor) -> None:
    hidden.grad_fn.register_hook(lambda found, _: tuple(g.flip(0) for g in found))


def _before_an_operation(hidden: Tensor) -> None:
    hidden.grad_fn.register_prehook(lambda grads: (grads[0].flip(0),))


@pytest.mark.parametrize(
    "hook", [_on_an_activation, _by_a_function_of_ours, _on_an_operation, _before_an_operation]
)
def test_hooks_of_the_graph_are_run_row_by_row_which_is_told(
    hook: Callable[[Tensor], None],
) -> None:
    net = _net()
    engine = Engine(net, batch_dim=0)
    hidden = net[1](net[0](randn(B, 3)))
    hook(hidden)
    losses = net[2](hidden).square().sum(1)
    with pytest.warns(RowByRowWarning, match="Each of the 4 losses"):
        _right(engine, losses, net)
    with pytest.warns(RowByRowWarning):
        assert "backward pass of its own" in engine.explain(losses)


def test_hooks_of_ours_in_passes_of_other_threads_are_nobody_elses() -> None:
    net, other = _net(), _net()
    losses, others = net(randn(B, 3)).square().sum(1), other(randn(B, 3))
    with ThreadPoolExecutor(1) as pool, OuterPass().starting_at([others]):
        # Somebody makes one meanwhile, so that there is a look at all of them.
        others.grad_fn.register_hook(lambda *_: None).remove()
        pool.submit(_right, Engine(net, batch_dim=0), losses, net).result()


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("hook", [_on_an_activation, _on_an_operation])
def test_hooks_of_what_is_computed_from_a_parameter_are_heard_in_every_step(
    hook: Callable[[Tensor], None], batch_dim: int | None
) -> None:
    net = _net()
    turned = net[0].weight.T  # once, for all steps
    hook(turned)
    for _ in range(2):
        losses = net[2](torch.tanh(randn(B, 3) @ turned)).square().sum(1)
        _right(Engine(net, batch_dim=batch_dim), losses, net)


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("join", [torch.stack, torch.cat])
def test_hooks_of_losses_that_were_put_into_a_row(join: Any, batch_dim: int | None) -> None:
    net = _net()
    outputs = net(randn(3, 3))
    losses = join([output.square().sum(0, keepdim=join is torch.cat) for output in outputs])
    losses.register_hook(lambda gradient: gradient * torch.tensor([2.0, 1.0, 3.0]))
    _right(Engine(net, batch_dim=batch_dim), losses, net)


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_waits_for_several_parameters_is_refused_and_nothing_changes(way: str) -> None:
    net = _net()
    note = torch.autograd.graph.register_multi_grad_hook(list(net.parameters()), _ignore)
    losses = net(randn(B, 3)).sum(1)
    with pytest.raises(UnservedGraphError, match="register_multi_grad_hook"):
        WAYS[way](net, losses)
    assert all(parameter.grad is None for parameter in net.parameters())
    note.remove()
    WAYS[way](net, losses)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_hook_for_the_first_of_several_parameters_runs_for_each_loss(
    batch_dim: int | None,
) -> None:
    net, heard = _net(), list[Tensor]()
    torch.autograd.graph.register_multi_grad_hook(list(net.parameters()), heard.append, mode="any")
    losses = net(randn(B, 3)).sum(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gramian = Engine(net, batch_dim=batch_dim).compute_gramian(losses)
    assert [warning.category for warning in told] == (
        [] if batch_dim is None else [RowByRowWarning]
    )
    assert len(heard) == B
    rows = explicit_jacobian(losses, list(net.parameters()))
    assert relative_error(gramian, rows @ rows.T) < 1e-12


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_hooks_of_tables_hear_of_sparse_gradients(batch_dim: int | None) -> None:
    table = nn.Embedding(7, 3, sparse=True)
    table.weight.register_hook(lambda grad: grad * 2.0 if grad.is_sparse else grad)
    losses = table(torch.arange(12).view(B, 3) % 7).square().sum((1, 2))
    _right(Engine(table, batch_dim=batch_dim), losses, table)


# -- threads, each of which numbers its operations by itself ---------------------------------------


def _in_thread(function: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _numbered_far() -> None:
    number = torch.ones(1, requires_grad=True)
    for _ in range(1 << 14):
        number = number * 1.0


def _with_swapped_samples(net: nn.Sequential) -> Tensor:
    hidden = net[0](randn(B, 3)).tanh()
    losses: Tensor = net[2](hidden).square().sum(1)
    hidden.register_hook(lambda grad: grad[[1, 0, 2, 3]])
    return losses


def _plain(net: nn.Sequential) -> Tensor:
    losses: Tensor = net(randn(B, 3)).square().sum(1)
    return losses


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_hooks_on_a_graph_of_another_thread_are_heard() -> None:
    net = _net()
    engine = Engine(net, batch_dim=0)
    _right(engine, _plain(net), net)

    def elsewhere() -> Tensor:
        _numbered_far()
        _numbered_far()
        return _with_swapped_samples(net)

    _right(engine, _in_thread(elsewhere), net)


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_hooks_are_heard_by_a_thread_after_another_one_looked_for_them() -> None:
    net = _net()
    engine = Engine(net, batch_dim=0)
    _right(engine, _plain(net), net)
    _numbered_far()
    losses = _with_swapped_samples(net)
    _in_thread(lambda: engine.compute_gramian(_plain(net)))
    _right(engine, losses, net)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_hooks_of_saved_tensors_may_unpack_into_the_same_memory_each_time(
    batch_dim: int | None,
) -> None:
    memory = torch.empty(B, 6, dtype=torch.float64)

    def pack(saved: Tensor) -> Tensor:
        return saved.clone() if saved.shape == memory.shape else saved

    def unpack(packed: Tensor) -> Tensor:
        return memory.copy_(packed) if packed.shape == memory.shape else packed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Tanh()).double()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hidden = model(torch.randn(B, 6, dtype=torch.float64))
    losses = hidden.sum(1 if batch_dim == 0 else 0)
    jacobian = explicit_jacobian(losses, list(model.parameters()))
    engine = Engine(model, batch_dim=batch_dim)
    assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12
    engine.backward(losses, lambda gramian: torch.ones(len(gramian), dtype=torch.float64))
    update = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative_error(update, jacobian.sum(0)) < 1e-12
