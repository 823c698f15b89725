"""
Which distribution provides which name, for the error message when it is not installed.

Data for messages only: nothing is looked up or loaded through this table, and a test keeps it equal
to what the distributions of this repository provide.
"""

from __future__ import annotations

from jdcore.spec import normalize_name

METHODS = {
    "jdplugins-robust": (
        "arc",
        "bucketing",
        "caf",
        "centered_clipping",
        "clipping",
        "coordinate_wise_median",
        "geometric_median",
        "mda",
        "meamed",
        "monna",
        "multi_krum",
        "nnm",
        "smea",
    ),
    "jdplugins-standard": (
        "aligned_mtl",
        "cagrad",
        "config",
        "conic_grad",
        "constant",
        "cr_mogm",
        "db_mtl",
        "dcgd",
        "dualproj",
        "epo",
        "excess_mtl",
        "fairgrad",
        "graddrop",
        "gradnorm",
        "gradvac",
        "imtl_g",
        "krum",
        "mean",
        "mgda",
        "moco",
        "modo",
        "nash_mtl",
        "pcd",
        "pcgrad",
        "per_group",
        "periodic",
        "present_tasks",
        "random",
        "row_momentum",
        "row_normalized",
        "sdmgrad",
        "sum",
        "trimmed_mean",
        "upgrad",
    ),
}


SCALARIZERS: dict[str, tuple[str, ...]] = {
    "jdplugins-standard": (
        "chebyshev",
        "constant",
        "cosmos",
        "dwa",
        "famo",
        "geometric_mean",
        "imtl_l",
        "mean",
        "pbi",
        "random",
        "stch",
        "sum",
        "uw",
    ),
}


SOLVERS: dict[str, dict[str, tuple[str, ...]]] = {
    "jdplugins-cvxpy": {"conflict_averse": ("cvxpy",), "nash_bargaining": ("ecos",)},
    "jdplugins-quadprog": {"dual_cone": ("qpsolvers", "quadprog")},
    "jdplugins-standard": {
        "conflict_averse": ("native",),
        "dual_cone": ("native",),
        "fair_allocation": ("native",),
        "min_norm": ("frank_wolfe", "native"),
        "nash_bargaining": ("native",),
    },
}


def solver_names(problem: str) -> dict[str, tuple[str, ...]]:
    """Names of the backends known for a problem, by distribution."""
    return {d: problems[problem] for d, problems in SOLVERS.items() if problem in problems}


def distribution_of(name: str, problem: str | None = None, kind: str = "aggregator") -> str | None:
    """
    Name of the distribution known to provide a method, in any spelling.

    :param name: Plain name, ``"distribution:name"``, or ``"name:variant"`` of a solver.
    :param problem: The problem if it is a solver that is looked for.
    :param kind: ``"aggregator"`` or ``"scalarizer"``, if it is none.
    """
    table = SCALARIZERS if kind == "scalarizer" else METHODS
    if problem is not None:
        table = solver_names(problem)
    parts = name.split(":")
    keys = {normalize_name(part) for part in (parts[-1:] if problem is None else parts)}
    for distribution, names in table.items():
        if not keys.isdisjoint(map(normalize_name, names)):
            return distribution
    return None
