"""Solvers with arguments in configurations."""

from __future__ import annotations

import json

import pytest
import torch

import jdcore
from jdcore import ParameterError, UnknownNameError
from tests.plugins.distributions import needs

pytestmark = [needs("jdplugins-quadprog"), needs("jdplugins-standard")]


@pytest.mark.parametrize(
    "solver",
    [
        "quadprog",
        "qpsolvers:quadprog",
        {"name": "quadprog", "fallback": "native", "tolerance": 1e-8},
        {"name": "qpsolvers", "options": {"verbose": False}},
    ],
)
def test_a_solver_survives_a_configuration(solver: str | dict[str, object]) -> None:
    config = {"name": "upgrad", "solver": solver}
    method = jdcore.get_aggregator(config)

    written = jdcore.to_config(method)

    assert written == config
    assert repr(jdcore.get_aggregator(json.loads(json.dumps(written)))) == repr(method)
    update = method(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    torch.testing.assert_close(update, torch.tensor([0.2923977, 1.9005848, 1.9005848]))


def test_a_solver_without_arguments_is_described_by_its_name() -> None:
    method = jdcore.get_aggregator("upgrad", solver=jdcore.get_solver("dual_cone", "quadprog"))

    assert jdcore.to_config(method)["solver"] == {"name": "quadprog"}


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"fallback": "native"}, r"`config\.solver\.name` must be the name of a dual_cone solver"),
        ({"name": "quadprog", "tolerance": -1.0}, r"`config\.solver\.tolerance` must be >= 0"),
        ({"name": "quadprog", "speed": 3}, r"`config\.solver\.speed` must be one that 'quadprog'"),
    ],
)
def test_a_bad_argument_of_a_solver_is_named_with_its_path(
    solver: dict[str, object], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        jdcore.get_aggregator({"name": "upgrad", "solver": solver})


@pytest.mark.parametrize(
    ("solver", "path"),
    [
        ("qpsolvers:no_such", "config.solver"),
        ({"name": "qpsolvers:no_such"}, "config.solver.name"),
        ({"name": "no_such"}, "config.solver.name"),
        ({"name": "quadprog", "fallback": "no_such"}, "config.solver.fallback"),
    ],
)
def test_an_unknown_solver_is_named_with_its_path(solver: object, path: str) -> None:
    with pytest.raises(UnknownNameError, match=f"`{path}` asks for it"):
        jdcore.get_aggregator({"name": "upgrad", "solver": solver})
