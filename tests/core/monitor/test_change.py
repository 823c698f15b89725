from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore.errors import ParameterError
from jdcore.monitor import first_order_change


def test_the_change_is_the_jacobian_times_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    step = {p: torch.randn_like(p) for p in parameters}

    change = first_order_change(lambda: model(inputs), step)

    rows = []
    for loss in model(inputs).flatten():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(sum((g * step[p]).sum() for g, p in zip(gradients, parameters, strict=True)))
    torch.testing.assert_close(change, torch.stack(rows).view(5, 2), rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


def test_the_losses_are_differentiated_where_the_step_began() -> None:
    w = torch.tensor([3.0], requires_grad=True)

    change = first_order_change(
        lambda: w**2, {w: torch.tensor([1.0])}, before={w: w.detach() * 0 + 2}
    )

    assert change.tolist() == [4.0]
    assert w.item() == 3.0


def test_a_failing_loss_leaves_the_parameters_where_they_are() -> None:
    w = torch.tensor([3.0], requires_grad=True)

    def fail() -> Tensor:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        first_order_change(fail, {w: torch.ones(1)}, before={w: torch.zeros(1)})

    assert w.item() == 3.0


def test_the_random_numbers_of_the_training_stay_its_own() -> None:
    w = torch.ones(4, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    first_order_change(lambda: nn.functional.dropout(w), {w: torch.ones(4)})

    assert torch.equal(torch.rand(1), expected)


def test_losses_that_reach_no_parameter_are_refused() -> None:
    w, other = (torch.ones(1, requires_grad=True) for _ in range(2))

    with pytest.raises(ParameterError, match="`losses` must be a function of the parameters"):
        first_order_change(lambda: other * 2, {w: torch.ones(1)})


def test_losses_without_a_graph_are_refused() -> None:
    w = torch.ones(1, requires_grad=True)

    with pytest.raises(ParameterError, match="differentiable losses"):
        first_order_change(lambda: w.detach(), {w: torch.ones(1)})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda w: {}, "`step` must be of at least one parameter, as a mapping, got none"),
        (lambda w: [w], "`step` must be of at least one parameter, as a mapping, got a list"),
        (lambda w: {w: torch.ones(1)}, r"of shape \[2\] for a parameter.*of shape \[1\]"),
        (lambda w: {w.detach(): torch.ones(2)}, "of parameters that require grad, got a frozen"),
    ],
)
def test_a_step_that_is_none_is_refused(step: Callable[[Tensor], Any], message: str) -> None:
    w = torch.tensor([3.0, 1.0], requires_grad=True)

    with pytest.raises(ParameterError, match=message):
        first_order_change(lambda: w * 1.0, step(w))
