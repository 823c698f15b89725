"""Layers of the same inputs, such as heads of tasks, which count as one with the outputs of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Dense, Engine, Share, Site
from jdcore.graph import RULES
from tests.core.autogram.oracle import (
    check_engine,
    explicit_jacobian,
    parameters_of,
    randn,
    relative_error,
)
from tests.operations import Operations

B, T, D = 5, 3, 6


class _Heads(nn.Module):
    """Linear heads of several widths, with and without a bias, and two that lie transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(D, D)
        self.linear = nn.ModuleList(nn.Linear(D, o) for o in (1, 1, 2))
        self.plain = nn.ModuleList(nn.Linear(D, o, bias=False) for o in (1, 2))
        self.turned = nn.ParameterList(nn.Parameter(torch.randn(D, o)) for o in (1, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x.flatten(0, -2)).tanh()
        found = [head(hidden) for head in (*self.linear, *self.plain)]
        return [*found, *(hidden @ weight for weight in self.turned)]


def _of_samples(model: nn.Module) -> Tensor:
    return torch.cat(model(randn(B, D)), 1).square().sum(1)


def _of_tasks(model: nn.Module) -> Tensor:
    return torch.stack([head.square().sum(1) for head in model(randn(B, D))], 1)


def _of_sequences(model: nn.Module) -> Tensor:
    heads = [head.view(B, T, -1) for head in model(randn(B, T, D))]
    return torch.stack([head.square().sum((1, 2)) for head in heads])


@pytest.mark.parametrize(
    ("losses", "batch_dim"), [(_of_samples, 0), (_of_tasks, 0), (_of_sequences, 1)]
)
def test_heads_are_right(losses: Any, batch_dim: int) -> None:
    check_engine(_Heads, losses, batch_dim)


# A budget asks for what accelerators do.
@pytest.mark.parametrize("budget", [None, 1 << 24])
def test_products_of_their_inputs_are_made_once(budget: int | None) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, D), nn.ModuleList(nn.Linear(D, 1) for _ in range(4))
    engine = Engine(trunk, heads, batch_dim=0, memory_budget=budget)
    x = torch.randn(B, 4)

    def losses() -> Tensor:
        hidden = trunk(x).relu()
        return torch.cat([head(hidden) for head in heads], 1).square()

    engine.compute_gramian(losses())
    output = losses()
    with Operations() as counted:
        engine.compute_gramian(output)
    # One for all heads, and one for the trunk.
    assert counted.counts["mul_"] == 2
    # In each of four passes one for the gradient of each head, as none of them is batched here;
    # then two for all heads, and two for the trunk.
    if budget is None:
        assert counted.counts["mm"] == 4 * 4 + 2 + 2


def _operations_of_tasks(count: int, budget: int | None) -> int:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(8, 64), nn.ModuleList(nn.Linear(64, 1) for _ in range(count))
    engine, x = Engine(trunk, heads, batch_dim=None, memory_budget=budget), torch.randn(16, 8)

    def step() -> None:
        hidden = trunk(x).tanh()
        losses = torch.stack([head(hidden).square().mean() for head in heads])
        engine.backward(losses, lambda gramian: gramian.new_ones(count))

    step()
    with Operations() as counted:
        step()
    return counted.counts.total()


@pytest.mark.parametrize("budget", [None, 1 << 28])
def test_a_further_task_costs_few_operations(budget: int | None) -> None:
    plain = 21  # those of one head and its loss, forward and backward
    further = _operations_of_tasks(16, budget) - _operations_of_tasks(4, budget)
    assert further <= 12 * (1.5 * plain + 6)


def test_inputs_that_were_exchanged_between_two_uses_are_told_apart() -> None:
    first, second = nn.Linear(D, 1).double(), nn.Linear(D, 2).double()
    x = randn(B, D).requires_grad_()
    hidden = x.tanh()
    head = first(hidden)
    hidden.data = randn(B, D) + 1.0  # the same place in the graph, other numbers
    losses = torch.cat([head, second(hidden)], 1).square().sum(1)
    jacobian = explicit_jacobian(losses, parameters_of([first, second]))
    gramian = Engine(first, second, batch_dim=0).compute_gramian(losses)
    assert relative_error(gramian, jacobian @ jacobian.T) < 1e-12


def test_inputs_that_are_the_negative_of_others_in_the_same_memory_are_told_apart() -> None:
    heads = nn.ModuleList(nn.Linear(D, o).double() for o in (1, 1, 2, 2))
    hidden = randn(B, D).requires_grad_().tanh()
    turning = torch.complex(hidden, 2.0 * hidden)
    inputs = turning.imag, turning.conj().imag
    assert inputs[0].data_ptr() == inputs[1].data_ptr()
    found = [head(inputs[i // 2]) for i, head in enumerate(heads)]
    losses = torch.cat(found, 1).square().sum(1)
    jacobian = explicit_jacobian(losses, parameters_of([heads]))
    Engine(heads, batch_dim=0).backward(losses, lambda gramian: gramian.new_ones(B))
    update = torch.cat([parameter.grad.flatten() for parameter in heads.parameters()])
    assert relative_error(update, jacobian.sum(0)) < 1e-12


def test_a_bias_of_each_sample_is_none_of_each_output() -> None:
    weight = randn(D, B).requires_grad_()
    bias = nn.Parameter(randn(B, 1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight.detach().clone()), bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    model = Model()
    losses = model(randn(B, D)).square().sum(1)
    jacobian = explicit_jacobian(losses, parameters_of([model]))
    gramian = Engine(model, batch_dim=0).compute_gramian(losses)
    assert relative_error(gramian, jacobian @ jacobian.T) < 1e-12


def test_gradients_that_a_rule_gives_to_two_parameters_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = torch.full((D,), 2.0)

    class Keeping(Dense):
        def weighted(self, weights: Tensor) -> Tensor:
            return kept

    def rule(site: Site, operand: int) -> Share:
        return Keeping(site.broadcast(site.grad, operand).rows(), (D,))

    monkeypatch.setitem(RULES, "MulBackward0", rule)
    # Long rows, as those of short ones are summed together.
    monkeypatch.setattr("jdcore.graph._root_shares.SHORT", 0)
    scales = nn.ParameterList([nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))])
    losses = (torch.randn(B, D) * scales[0] * scales[1]).sum(1)
    Engine(scales, batch_dim=0).backward(losses, lambda gramian: torch.ones(B))
    first, second = (scale.grad for scale in scales)
    assert first is not None
    assert second is not None
    first.add_(1.0)
    assert second.tolist() == [2.0] * D
    second.add_(1.0)
    assert kept.tolist() == [2.0] * D  # which the rule keeps
