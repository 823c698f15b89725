"""What this distribution provides. Imports neither torch nor any solver."""

from __future__ import annotations

from collections.abc import Iterator

from jdcore import SolverSpec, hookimpl

_PACKAGE = "jdplugins.quadprog"


@hookimpl
def jdcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec(
        name="quadprog",
        problem="dual_cone",
        summary="Goldfarb-Idnani in C, one row at a time; exact after refinement.",
        factory=f"{_PACKAGE}._quadprog:QuadprogSolver",
        requires=("quadprog",),
        api_version=1,
    )
    yield SolverSpec(
        name="qpsolvers",
        problem="dual_cone",
        summary="Any solver that qpsolvers finds installed, as in 'qpsolvers:daqp'; then refined.",
        factory=f"{_PACKAGE}._qpsolvers:QpsolversSolver",
        variants=True,
        requires=("qpsolvers",),
        api_version=1,
    )
