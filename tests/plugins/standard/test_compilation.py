"""Calls of jdcore inside of what ``torch.compile`` compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import get_aggregator, get_scalarizer, get_weighting
from jdcore.aggregation import Flattening
from jdcore.autogram import Engine, gramian
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, mtl_backward, zero_jac

# What torch says of what it traces around the calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

MATRIX = torch.tensor([[1.0, -2.0, 3.0], [-2.0, 1.0, 4.0], [0.5, 0.0, -3.0]])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    result: Callable[..., Any] = torch.compile(function, backend="eager")
    return result


METHODS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "of the Gramian": lambda: get_aggregator("upgrad"),
    "of its size": lambda: get_aggregator("mean"),
    "of coordinates": lambda: get_aggregator("trimmed_mean", trim_number=1),
    "of history": lambda: get_aggregator("moco"),
    "with state": lambda: get_aggregator("nash_mtl", update_weights_every=2),
    "of other rows": lambda: get_aggregator("present_tasks", aggregator=get_aggregator("graddrop")),
    "of groups": lambda: get_aggregator(
        "per_group", aggregator=get_aggregator("mgda"), columns=[2]
    ),
    "a weighting": lambda: get_weighting("mgda"),
    "a wrapped weighting": lambda: get_weighting("cr_mogm", weighting=get_weighting("mgda")),
    "a mixed weighting": lambda: (
        get_aggregator("present_tasks", aggregator=get_aggregator("mgda")).weighting
    ),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_method_is_called_as_outside(make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    inside, outside = make(), make()
    call = compiled(lambda matrix: inside(matrix @ matrix.T) + 1.0)

    for scale in (1.0, 2.0, 3.0):
        torch.manual_seed(0)
        expected = outside(scale * MATRIX @ (scale * MATRIX).T) + 1.0
        torch.manual_seed(0)
        torch.testing.assert_close(call(scale * MATRIX), expected)


def test_a_flattening_is_called_as_outside() -> None:
    flattening = Flattening(get_weighting("mgda"))
    generalized = torch.eye(4).reshape(2, 2, 2, 2).transpose(2, 3)

    torch.testing.assert_close(compiled(flattening)(generalized), torch.full((2, 2), 0.25))


def of_backward(model: nn.Sequential, x: Tensor) -> None:
    backward(model(x).square().mean(0))
    jac_to_grad(model.parameters(), get_aggregator("upgrad"))


def of_a_batch_that_is_skipped(model: nn.Sequential, x: Tensor) -> None:
    backward((-model(x)).exp().mean(0))
    zero_jac(model.parameters())
    of_backward(model, x)


def of_mtl_backward(model: nn.Sequential, x: Tensor) -> None:
    features = model[0](x)
    mtl_backward(list(model[1](features).square().mean(0)), features)
    jac_to_grad(model[0].parameters(), get_aggregator("upgrad"))


def of_jac(model: nn.Sequential, x: Tensor) -> None:
    parameters = list(model.parameters())
    for parameter, rows in zip(parameters, jac(model(x).mean(0), parameters), strict=True):
        parameter.grad = rows.sum(0)


def of_gramian_backward(model: nn.Sequential, x: Tensor) -> None:
    gramian_backward(model(x).square().mean(0), get_weighting("upgrad"))


def of_an_engine(model: nn.Sequential, x: Tensor) -> None:
    Engine(model, batch_dim=0).backward(model(x).square().mean(1), get_weighting("upgrad"))


def of_a_gramian(model: nn.Sequential, x: Tensor) -> None:
    losses = model(x).square().mean(1)
    losses.backward(get_weighting("mgda")(Engine(model, batch_dim=0).compute_gramian(losses)))


def of_a_gramian_without_modules(model: nn.Sequential, x: Tensor) -> None:
    losses = model(x).square().mean(1)
    losses.backward(get_weighting("mgda")(gramian(losses, batch_dim=0)))


@pytest.mark.parametrize(
    "step",
    [
        *(of_backward, of_a_batch_that_is_skipped, of_mtl_backward, of_jac),
        *(of_gramian_backward, of_an_engine, of_a_gramian, of_a_gramian_without_modules),
    ],
)
def test_a_step_leaves_the_gradients_of_one_outside(
    step: Callable[[nn.Sequential, Tensor], None],
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)

    def gradients(run: Callable[[nn.Sequential, Tensor], None]) -> list[Tensor]:
        model.zero_grad()
        run(model, x)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(step)

    assert len(expected) == 4
    torch.testing.assert_close(gradients(compiled(step)), expected)


@pytest.mark.parametrize(("name", "advance"), [("dwa", "step"), ("famo", "update")])
def test_a_scalarizer_with_state_is_called_as_outside(name: str, advance: str) -> None:
    inside, outside = get_scalarizer(name), get_scalarizer(name)
    call = compiled(lambda losses: inside(2.0 * losses))

    for values in ([1.0, 2.0], [1.0, 1.0], [0.5, 1.0]):
        losses = torch.tensor(values, requires_grad=True)
        results = [scalarize(losses) for scalarize in (call, lambda ls: outside(2.0 * ls))]
        torch.testing.assert_close(results[0], results[1])
        one, two = (torch.autograd.grad(result, losses)[0] for result in results)
        torch.testing.assert_close(one, two)
        for scalarizer in (inside, outside):
            getattr(scalarizer, advance)(*([losses.detach()] if name == "famo" else []))
