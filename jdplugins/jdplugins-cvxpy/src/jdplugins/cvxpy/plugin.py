"""What this distribution provides. Imports neither torch nor any solver."""

from __future__ import annotations

from collections.abc import Iterator

from jdcore import SolverSpec, hookimpl

_PACKAGE = "jdplugins.cvxpy"


@hookimpl
def jdcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec(
        name="cvxpy",
        problem="conflict_averse",
        summary="A second-order cone program by CLARABEL, or by 'cvxpy:SOLVER'; five digits.",
        factory=f"{_PACKAGE}._conflict_averse:CvxpySolver",
        variants=True,
        requires=("cvxpy",),
        api_version=1,
    )
    yield SolverSpec(
        name="ecos",
        problem="nash_bargaining",
        summary="The published convex-concave procedure; three digits or more.",
        factory=f"{_PACKAGE}._nash_bargaining:EcosSolver",
        requires=("ecos",),
        api_version=1,
    )
