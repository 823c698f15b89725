"""jdplugins-standard needs torch and numpy only: run by ``tox -e core``, after the core alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

import jdcore
from tests.environments import clean_environment

SOLVERS = ("cvxpy", "ecos", "qpsolvers", "quadprog", "scipy")


def installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


@pytest.fixture(autouse=True)
def _alone() -> None:
    # In the environment made for these tests, something installed by mistake must not skip them.
    if os.environ.get("TOX_ENV_NAME") == "core":
        return
    others = [d for d in (*SOLVERS, "jdplugins-cvxpy", "jdplugins-quadprog") if installed(d)]
    if others:
        pytest.skip(f"needs an environment (tox -e core) without {', '.join(others)}")


@pytest.mark.parametrize("module", SOLVERS)
def test_no_solver_library_comes_with_the_methods(module: str) -> None:
    assert find_spec(module) is None


def test_native_solves_every_problem() -> None:
    solvers = jdcore.list_solvers()

    problems = {"conflict_averse", "dual_cone", "fair_allocation", "min_norm", "nash_bargaining"}
    assert set(solvers) >= problems
    assert all("native" in names for names in solvers.values())


def test_every_method_works() -> None:
    # In a process of its own, where no other test has registered a method.
    code = """
import torch, jdcore
from jdcore.aggregation._informed import example_inputs
J = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
for name in jdcore.list_aggregators():
    spec = jdcore.describe(name)
    update = jdcore.get_aggregator(name, **spec.example(6))(J, **example_inputs(spec, J))
    assert update.shape == (20,) and update.isfinite().all(), name
print(len(jdcore.list_aggregators()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 17


@pytest.mark.parametrize(
    ("problem", "name", "distribution"),
    [
        ("dual_cone", "quadprog", "jdplugins-quadprog"),
        ("dual_cone", "qpsolvers:daqp", "jdplugins-quadprog"),
        ("conflict_averse", "cvxpy:SCS", "jdplugins-cvxpy"),
        ("nash_bargaining", "ecos", "jdplugins-cvxpy"),
    ],
)
def test_the_error_for_an_absent_solver_says_what_to_install(
    problem: str, name: str, distribution: str
) -> None:
    with pytest.raises(jdcore.UnknownNameError, match=f"pip install {distribution}"):
        jdcore.get_solver(problem, name)
