"""Solvers tell those who watch the training how exact their answers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jdcore
from jdcore.aggregation._observation import Observation, observing

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
