"""Steps inside of transforms of ``torch.func`` and of forward-mode AD, refused or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from jdcore import ParameterError
from jdcore.autogram import Engine
from jdcore.autogram import backward as weighted_backward
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, mtl_backward

Transform = Callable[[Callable[[Tensor], Tensor], Tensor], Any]
Step = Callable[[nn.Sequential, Tensor], Any]

TRANSFORMS: dict[str, Transform] = {
    "vmap": lambda function, x: torch.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(function)(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
}


def first(gramian: Tensor) -> Tensor:
    return torch.ones(len(gramian))


def multi_task(model: nn.Sequential, x: Tensor) -> None:
    features = model[0](x)
    mtl_backward(list(model[1](features).square().mean(0)), features)


STEPS: dict[str, Step] = {
    "backward": lambda model, x: backward(model(x).square().mean(0)),
    "jac": lambda model, x: jac(model(x).square().mean(0), list(model.parameters())),
    "mtl_backward": multi_task,
    "gramian_backward": lambda model, x: gramian_backward(model(x).square().mean(0), first),
    "autogram.backward": lambda model, x: weighted_backward(
        model(x).square().mean(0), first, batch_dim=None
    ),
    "Engine.backward": lambda model, x: Engine(model, batch_dim=0).backward(
        model(x).square().mean(1), first
    ),
    "Engine.compute_gramian": lambda model, x: Engine(model, batch_dim=0).compute_gramian(
        model(x).square().mean(1)
    ),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def check_nothing_written(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "jac")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_step_inside_of_a_transform_is_refused_and_writes_nothing(
    step: str, transform: str
) -> None:
    model = network()

    def inside(x: Tensor) -> Tensor:
        x = x.reshape(-1, 4)
        STEPS[step](model, x)
        return x.sum()

    with pytest.raises(ParameterError, match=r"outside of the transforms of torch\.func"):
        TRANSFORMS[transform](inside, torch.randn(5, 4))

    check_nothing_written(model)


@pytest.mark.parametrize("step", STEPS)
def test_losses_from_outside_are_refused_inside_of_functionalize(step: str) -> None:
    # What is written there is a tensor of the transform, not there afterwards.
    model, x = network(), torch.randn(5, 4)

    def inside(other: Tensor) -> Tensor:
        STEPS[step](model, x)
        return other.sum()

    with pytest.raises(ParameterError, match=r"outside of the transforms of torch\.func"):
        torch.func.functionalize(inside)(torch.ones(2))

    check_nothing_written(model)


def test_jacobians_are_not_aggregated_inside_of_functionalize() -> None:
    model = network()
    backward(model(torch.randn(5, 4)).square().mean(0))

    def inside(other: Tensor) -> Tensor:
        jac_to_grad(model.parameters(), lambda matrix: matrix.sum(dim=0))
        return other.sum()

    with pytest.raises(ParameterError, match=r"outside of the transforms of torch\.func"):
        torch.func.functionalize(inside)(torch.ones(2))

    for parameter in model.parameters():
        assert parameter.grad is None
        assert hasattr(parameter, "jac")


@pytest.mark.parametrize("step", STEPS)
def test_losses_with_a_tangent_are_refused_by_name(step: str) -> None:
    model, x = network(), torch.randn(5, 4)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ParameterError, match="without a tangent of forward-mode AD"):
            STEPS[step](model, dual)

    check_nothing_written(model)


@pytest.mark.parametrize("step", STEPS)
def test_losses_without_a_tangent_are_differentiated_inside_of_a_level(step: str) -> None:
    inside, outside, x = network(), network(), torch.randn(5, 4)
    outside.load_state_dict(inside.state_dict())

    with forward_ad.dual_level():
        STEPS[step](inside, x)
    STEPS[step](outside, x)

    for one, other in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(getattr(one, "jac", None), getattr(other, "jac", None))
