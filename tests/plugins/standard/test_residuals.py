"""Solvers tell those who watch the training how exact their answers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jdcore
from jdcore import monitor
from jdcore.aggregation._observation import Observation, observing
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad

SOLVING: dict[str, dict[str, Any]] = {
    "upgrad": {},
    "dualproj": {},
    "mgda": {},
    "cagrad": {"c": 0.5},
    "nash_mtl": {},
    "fairgrad": {"alpha": 2.0},
}


@pytest.mark.parametrize("name", SOLVING)
@pytest.mark.parametrize("m", [2, 3, 5, 12, 60])
def test_the_residual_of_the_last_solve_can_be_observed(name: str, m: int) -> None:
    J = torch.randn(m, 2 * m, generator=torch.Generator().manual_seed(m))
    heard: list[Observation] = []

    with observing(heard.append):
        jdcore.get_aggregator(name, **SOLVING[name])(J)

    [observation] = heard
    assert observation.residual is not None
    assert 0.0 <= observation.residual <= 1e-10


@pytest.mark.parametrize("m", [2, 5])
def test_a_zero_row_is_the_shortest_vector_exactly(m: int) -> None:
    J = torch.eye(m)
    J[1] = 0.0
    heard: list[Observation] = []

    with observing(heard.append):
        jdcore.get_aggregator("mgda")(J)

    assert heard[0].residual in (0.0, None)


def test_a_method_that_solves_nothing_has_no_residual() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        jdcore.get_aggregator("mean")(torch.eye(3))

    assert heard[0].residual is None


@pytest.mark.parametrize("name", ["upgrad", "mgda", "nash_mtl"])
@pytest.mark.parametrize("call", ["jac_to_grad", "gramian_backward", "engine", "weighting"])
def test_a_record_that_is_read_late_tells_what_it_would_have_told_at_once(
    name: str, call: str
) -> None:
    early: list[dict[str, Any]] = []

    _train(name, call, lambda step: early.append(step.to_dict()))
    late = _train(name, call, lambda step: None)

    told = [{**step.to_dict(), "seconds": None} for step in late]
    assert len(told) == 3
    assert told == [{**step, "seconds": None} for step in early]
    assert all(step["residual"] is not None for step in told)


def _train(name: str, call: str, callback: Callable[[monitor.Step], object]) -> monitor.History:
    """Three steps of plain descent on four losses, none of which has the gradients of another."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 5, generator=generator, dtype=torch.float64))
    inputs = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    weighting, gramian = jdcore.get_weighting(name), torch.empty(4, 4, dtype=torch.float64)
    engine = Engine(model, batch_dim=0)
    with monitor.record(callback) as history:
        for _ in range(3):
            model.zero_grad()
            losses = model(inputs).squeeze(1).square()
            if call == "jac_to_grad":
                backward(losses)
                jac_to_grad(model.parameters(), jdcore.get_aggregator(name))
            elif call == "gramian_backward":
                gramian_backward(losses, weighting)
            elif call == "engine":
                engine.backward(losses, weighting)
            else:  # the same tensors in all steps, as a loop may have them
                gramian.copy_(engine.compute_gramian(losses))
                weights = weighting(gramian)
                losses.backward(weights)
                weights.zero_()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    return history
