"""How often the host waits for the device in a step, however large the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jdcore
from jdcore import autogram
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward


def plain(model: nn.Sequential, x: Tensor) -> None:
    model(x).square().mean().backward()


def samples(model: nn.Sequential, x: Tensor) -> None:
    losses = model(x).square().sum(1)
    autogram.backward(losses, jdcore.get_weighting("upgrad"), batch_dim=0)


def tasks(model: nn.Sequential, x: Tensor) -> None:
    gramian_backward(list(model(x).square().mean(0)), jdcore.get_weighting("upgrad"))


def rows(model: nn.Sequential, x: Tensor) -> None:
    backward(list(model(x).square().mean(0)))
    jac_to_grad(model.parameters(), jdcore.get_aggregator("upgrad"))


def mean_of_samples(model: nn.Sequential, x: Tensor) -> None:
    autogram.backward(model(x).square().sum(1), jdcore.get_weighting("mean"), batch_dim=0)


def mean_of_rows(model: nn.Sequential, x: Tensor) -> None:
    backward(list(model(x).square().mean(0)))
    jac_to_grad(model.parameters(), jdcore.get_aggregator("mean"))


def shuffled(model: nn.Sequential, x: Tensor) -> None:
    losses = model(x)[torch.arange(5, -1, -1)].square().sum(1)
    autogram.backward(losses, jdcore.get_weighting("upgrad"), batch_dim=0)


def heads(model: nn.Sequential, x: Tensor) -> None:
    features = model[:-1](x)
    losses = list(model[-1](features).square().mean(0))
    own = list(model[-1].parameters())
    mtl_backward(losses, features, tasks_params=[own, [], [], []])
    jac_to_grad(model[:-1].parameters(), jdcore.get_aggregator("upgrad"))


# Of samples and tasks, the Gramian is looked at first, for whether float32 was enough to make it;
# of tasks, also whether rows cancelled as they were summed. The mean of rows looks whether it is
# finite. Where data decide which sample is where, that is looked at twice more.
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        *((plain, 0), (samples, 2), (tasks, 3), (rows, 1), (heads, 1)),
        *((mean_of_samples, 0), (mean_of_rows, 1), (shuffled, 4)),
    ],
)
@pytest.mark.parametrize("layers", [1, 6])
def test_the_host_waits_for_the_gramian_and_nothing_else(
    standin: Any, step: Callable[[nn.Sequential, Tensor], None], expected: int, layers: int
) -> None:
    inner = [m for _ in range(layers) for m in (nn.Linear(8, 8), nn.Tanh())]
    model, x = nn.Sequential(*inner, nn.Linear(8, 4)), torch.randn(6, 8)
    for _ in range(2):  # what is learnt about a graph when it is met first
        step(model, x)
    before = standin.waits()
    step(model, x)
    assert standin.waits() - before == expected
