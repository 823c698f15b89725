"""What this distribution provides. Imports neither torch nor any method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdcore import AggregatorSpec, Property, Reference, ScalarizerSpec, SolverSpec, hookimpl

_PACKAGE = "jdplugins.standard"

# Short, so that what a method guarantees fits into one line.
_NON_CONFLICTING = Property.NON_CONFLICTING
_LINEAR = Property.LINEAR_UNDER_SCALING
_STATIONARY = Property.STRONGLY_STATIONARY
_INVARIANT = Property.PERMUTATION_INVARIANT
_EQUIVARIANT = Property.SCALE_EQUIVARIANT
_DIFFERENTIABLE = Property.DIFFERENTIABLE
_ROBUST = Property.ROBUST


def _arxiv(title: str, year: int, number: str) -> Reference:
    return Reference(title=title, year=year, url=f"https://arxiv.org/pdf/{number}")


_RANDOM_WEIGHTING = _arxiv(
    "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    2021,
    "2111.10603",
)
_BARGAINING = _arxiv("Multi-Task Learning as a Bargaining Game", 2022, "2202.01017")
_IMPARTIAL = Reference(
    title="Towards Impartial Multi-task Learning",
    year=2021,
    url="https://discovery.ucl.ac.uk/id/eprint/10120667/",
)
_GRADIENT_BIAS = Reference(
    title="Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
    year=2023,
    url="https://openreview.net/pdf?id=dLAYGdKTi2",
)


def _method(
    name: str, class_name: str, summary: str, reference: Reference | None = None, **more: Any
) -> AggregatorSpec:
    """The spec of a method, whose module has its name."""
    kind = "weighting" if class_name.endswith("Weighting") else "aggregator"
    factory: dict[str, Any] = {kind: f"{_PACKAGE}.{name}:{class_name}"}
    return AggregatorSpec(
        name=name, summary=summary, reference=reference, api_version=1, **factory, **more
    )


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield _method(
        "mean",
        "MeanWeighting",
        "Mean of the rows: gradient descent on the mean of the losses.",
        properties=(_LINEAR, _STATIONARY, _INVARIANT, _EQUIVARIANT, _DIFFERENTIABLE),
    )
    yield _method(
        "upgrad",
        "UPGradWeighting",
        "Mean of the projections of all rows onto the dual cone.",
        _arxiv("Jacobian Descent for Multi-Objective Optimization", 2024, "2406.16232"),
        properties=(_NON_CONFLICTING, _LINEAR, _STATIONARY, _INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "dualproj",
        "DualProjWeighting",
        "Projection of the mean of the rows onto the dual cone.",
        _arxiv("Gradient Episodic Memory for Continual Learning", 2017, "1706.08840"),
        properties=(_NON_CONFLICTING, _STATIONARY, _INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "mgda",
        "MGDAWeighting",
        "Shortest vector in the convex hull of the rows.",
        Reference(
            title="Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
            year=2012,
            url="https://www.sciencedirect.com/science/article/pii/S1631073X12000738",
        ),
        properties=(_NON_CONFLICTING, _INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "cagrad",
        "CAGradWeighting",
        "Best worst-case improvement within a ball around the mean of the rows.",
        _arxiv("Conflict-Averse Gradient Descent for Multi-task Learning", 2021, "2110.14048"),
        properties=(_STATIONARY, _INVARIANT, _EQUIVARIANT),
        example=lambda m: {"c": 0.5},
    )
    yield _method(
        "sum",
        "SumWeighting",
        "Sum of the rows: gradient descent on the sum of the losses.",
        properties=(_LINEAR, _STATIONARY, _INVARIANT, _EQUIVARIANT, _DIFFERENTIABLE),
    )
    yield _method(
        "constant",
        "ConstantWeighting",
        "Weights chosen by the user: gradient descent on a weighted sum of the losses.",
        properties=(_LINEAR, _EQUIVARIANT, _DIFFERENTIABLE),
        example=_constant_weights,
    )
    yield _method(
        "random",
        "RandomWeighting",
        "Positive random weights that sum to 1, drawn anew at each call.",
        _RANDOM_WEIGHTING,
        properties=(_LINEAR, _STATIONARY, _EQUIVARIANT, _DIFFERENTIABLE),
        stochastic=True,
    )
    yield _method(
        "nash_mtl",
        "NashMTLWeighting",
        "Nash bargaining solution: the same relative gain for every objective.",
        _BARGAINING,
        properties=(_NON_CONFLICTING, _STATIONARY, _INVARIANT),
        stateful=True,
    )
    yield _method(
        "pcgrad",
        "PCGradWeighting",
        "Each row projected off the rows it conflicts with, in random order; summed.",
        _arxiv("Gradient Surgery for Multi-Task Learning", 2020, "2001.06782"),
        properties=(_LINEAR, _STATIONARY, _EQUIVARIANT),
        stochastic=True,
    )
    yield _method(
        "gradvac",
        "GradVacWeighting",
        "Pairs of rows brought to the cosine they have had on average; summed.",
        _arxiv(
            (
                "Gradient Vaccine: Investigating and Improving Multi-task Optimization in "
                "Massively Multilingual Models"
            ),
            2021,
            "2010.05874",
        ),
        properties=(_LINEAR, _STATIONARY, _EQUIVARIANT),
        stateful=True,
        stochastic=True,
    )
    yield _method(
        "imtl_g",
        "IMTLGWeighting",
        "Equal projections of the update onto the directions of all rows.",
        _IMPARTIAL,
        properties=(_INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "aligned_mtl",
        "AlignedMTLWeighting",
        "Principal components of the Jacobian made equally long and orthogonal.",
        _arxiv("Independent Component Alignment for Multi-Task Learning", 2023, "2305.19000"),
        properties=(_STATIONARY, _INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "config",
        "ConFIGWeighting",
        "Equal cosines with all rows, and the length they add up to.",
        _arxiv(
            "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
            2024,
            "2408.11104",
        ),
        properties=(_LINEAR, _INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "krum",
        "KrumWeighting",
        "Mean of the rows closest to their neighbours, robust to adversarial rows.",
        Reference(
            title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            year=2017,
            url=(
                "https://proceedings.neurips.cc/paper/2017/file/"
                "f4b9ec30ad9f68f89b29639786cb62ef-Paper.pdf"
            ),
        ),
        properties=(_EQUIVARIANT, _ROBUST),
        min_rows=4,
        example=lambda m: {"n_byzantine": 1},
    )
    yield _method(
        "trimmed_mean",
        "TrimmedMean",
        "Mean of each coordinate without its largest and smallest entries.",
        Reference(
            title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            year=2018,
            url="https://proceedings.mlr.press/v80/yin18a/yin18a.pdf",
        ),
        properties=(_INVARIANT, _EQUIVARIANT, _ROBUST),
        min_rows=3,
        example=lambda m: {"trim_number": 1},
    )
    yield _method(
        "graddrop",
        "GradDrop",
        "Each coordinate keeps its positive or its negative entries, at random.",
        _arxiv(
            "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
            2020,
            "2010.06808",
        ),
        properties=(_INVARIANT, _EQUIVARIANT),
        stochastic=True,
    )
    yield _method(
        "modo",
        "MoDoWeighting",
        "One step per call towards the shortest combination, of two independent batches.",
        Reference(
            title=(
                "Three-Way Trade-Off in Multi-Objective Learning: Optimization, "
                "Generalization and Conflict-Avoidance"
            ),
            year=2024,
            url="https://www.jmlr.org/papers/volume25/23-1287/23-1287.pdf",
        ),
        properties=(_INVARIANT,),
        stateful=True,
        cross_gramian=True,
    )
    yield _method(
        "sdmgrad",
        "SDMGradWeighting",
        "Few steps per call towards a short update near a preferred one, of two batches.",
        _arxiv(
            (
                "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic "
                "Algorithms"
            ),
            2023,
            "2305.18409",
        ),
        properties=(_INVARIANT, _EQUIVARIANT),
        stateful=True,
        cross_gramian=True,
    )
    yield _method(
        "moco",
        "MoCo",
        "Rows tracked over time, and one step per call towards their shortest mixture.",
        _GRADIENT_BIAS,
        properties=(_INVARIANT,),
        stateful=True,
    )
    yield _method(
        "db_mtl",
        "DBMTL",
        "Gradients of the logarithms of the losses, averaged over time, of equal length.",
        _arxiv("Dual-Balancing for Multi-Task Learning", 2023, "2308.12029"),
        properties=(_STATIONARY, _INVARIANT, _EQUIVARIANT),
        stateful=True,
        losses=True,
    )
    yield _method(
        "excess_mtl",
        "ExcessMTL",
        "Weights that grow with the excess risk: robust to objectives with noisy labels.",
        Reference(
            title="Robust Multi-Task Learning with Excess Risks",
            year=2024,
            url="https://proceedings.mlr.press/v235/he24n.html",
        ),
        properties=(_STATIONARY, _INVARIANT, _EQUIVARIANT),
        stateful=True,
    )
    yield _method(
        "gradnorm",
        "GradNormWeighting",
        "Weights under which objectives that train slowly have the longer gradients.",
        _arxiv(
            (
                "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep "
                "Multitask Networks"
            ),
            2018,
            "1711.02257",
        ),
        properties=(_STATIONARY, _INVARIANT, _EQUIVARIANT),
        stateful=True,
        losses=True,
    )
    yield _method(
        "cr_mogm",
        "CRMOGMWeighting",
        "Another method, with momentum on its weights.",
        Reference(
            title=(
                "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond"
            ),
            year=2022,
            url=(
                "https://proceedings.neurips.cc/paper_files/paper/2022/file/"
                "f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf"
            ),
        ),
        properties=(_INVARIANT, _EQUIVARIANT),
        stateful=True,
        wrapper=True,
        example=_upgrad_weighting,
    )
    yield _method(
        "periodic",
        "PeriodicWeighting",
        "Another method, with new weights at every k-th call only.",
        _BARGAINING,
        properties=(_INVARIANT, _EQUIVARIANT),
        stateful=True,
        wrapper=True,
        example=lambda m: {**_upgrad_weighting(m), "every": 2},
    )
    yield _method(
        "row_momentum",
        "RowMomentum",
        "Another method, on moving averages of the rows.",
        _GRADIENT_BIAS,
        properties=(_INVARIANT, _EQUIVARIANT),
        stateful=True,
        wrapper=True,
        example=_upgrad_weighting,
    )
    yield _method(
        "row_normalized",
        "RowNormalized",
        "Another method, on rows divided by their norms, their losses, or both.",
        _arxiv("Multi-Task Learning as Multi-Objective Optimization", 2018, "1810.04650"),
        properties=(_NON_CONFLICTING, _INVARIANT),
        stateful=True,
        wrapper=True,
        example=_upgrad,
    )
    yield _method(
        "present_tasks",
        "PresentTasks",
        "Another method, on those objectives only that are present in the batch.",
        properties=(_NON_CONFLICTING, _INVARIANT, _EQUIVARIANT),
        stateful=True,
        wrapper=True,
        example=_upgrad,
    )
    yield _method(
        "per_group",
        "PerGroup",
        "Another method, on each group of parameters by itself.",
        properties=(_NON_CONFLICTING, _INVARIANT, _EQUIVARIANT),
        stateful=True,
        wrapper=True,
        expected_failures={
            "handles_no_columns": "groups are given by their numbers of columns",
            "handles_degenerate_rows": "groups of its example have more than a single column",
        },
        example=lambda m: {**_upgrad(m), "columns": (3, 1)},
    )
    yield _method(
        "dcgd",
        "DCGDWeighting",
        "The sum of two groups of rows, brought into the dual cone of their sums.",
        _arxiv(
            "Dual Cone Gradient Descent for Training Physics-Informed Neural Networks",
            2024,
            "2409.18426",
        ),
        properties=(_EQUIVARIANT,),
    )
    yield _method(
        "conic_grad",
        "ConicGradWeighting",
        "Best worst case in a cone around the mean of the rows, as long as the mean.",
        _arxiv(
            "Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone",
            2025,
            "2502.00217",
        ),
        properties=(_INVARIANT, _EQUIVARIANT),
    )
    yield _method(
        "pcd",
        "PCDWeighting",
        "The first row, changed so that all other objectives make some progress.",
        _arxiv(
            (
                "Not All Objectives Are Born Equal: Priority-Constrained Descent for "
                "Hierarchical Multi-Objective Optimization"
            ),
            2026,
            "2606.29521",
        ),
        properties=(_EQUIVARIANT,),
        stateful=True,
    )
    yield _method(
        "epo",
        "EPOWeighting",
        "Descent towards the Pareto optimum where losses are as a preference wants them.",
        Reference(
            title=(
                "Multi-Task Learning with User Preferences: Gradient Descent with "
                "Controlled Ascent in Pareto Optimization"
            ),
            year=2020,
            url="https://proceedings.mlr.press/v119/mahapatra20a/mahapatra20a.pdf",
        ),
        properties=(_EQUIVARIANT,),
        losses=True,
    )
    yield _method(
        "fairgrad",
        "FairGradWeighting",
        "Alpha-fair gains: from the largest sum over Nash bargaining to the worst case.",
        _arxiv("Fair Resource Allocation in Multi-Task Learning", 2024, "2402.15638"),
        properties=(_NON_CONFLICTING, _STATIONARY, _INVARIANT),
        example=lambda m: {"alpha": 2.0},
    )


def _constant_weights(m: int) -> dict[str, Any]:
    import torch  # only here, so that listing does without

    return {"weights": torch.arange(1.0, m + 1.0, device="cpu")}


def _upgrad(m: int) -> dict[str, Any]:
    import jdcore  # only here: making a method discovers the plugins

    del m
    return {"aggregator": jdcore.get_aggregator("upgrad")}


def _upgrad_weighting(m: int) -> dict[str, Any]:
    return {"weighting": _upgrad(m)["aggregator"].weighting}


def _scalarizer(
    name: str, class_name: str, summary: str, reference: Reference | None = None, **more: Any
) -> ScalarizerSpec:
    factory = f"{_PACKAGE}.scalarization.{name}:{class_name}"
    return ScalarizerSpec(
        name=name, summary=summary, scalarizer=factory, reference=reference, api_version=1, **more
    )


@hookimpl
def jdcore_scalarizers() -> Iterator[ScalarizerSpec]:
    yield _scalarizer("mean", "Mean", "Mean of the losses.")
    yield _scalarizer("sum", "Sum", "Sum of the losses.")
    yield _scalarizer(
        "constant",
        "Constant",
        "Weighted sum of the losses, with weights chosen by the user.",
        example=_constant_weights,
    )
    yield _scalarizer(
        "random",
        "Random",
        "Weighted sum of the losses, with random weights drawn anew at each call.",
        _RANDOM_WEIGHTING,
        stochastic=True,
    )
    yield _scalarizer(
        "geometric_mean",
        "GeometricMean",
        "Geometric mean of the losses.",
        _arxiv(
            (
                "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy "
                "for Multi-Task Learning"
            ),
            2019,
            "1904.08492",
        ),
        aliases=("gls",),
        positive=True,
    )
    yield _scalarizer(
        "uw",
        "UW",
        "Losses divided by learned variances.",
        _arxiv(
            (
                "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry "
                "and Semantics"
            ),
            2018,
            "1705.07115",
        ),
        trainable=True,
        example=_as_many,
    )
    yield _scalarizer(
        "imtl_l",
        "IMTLL",
        "Losses with learned scales that make all of them equally large.",
        _IMPARTIAL,
        trainable=True,
        example=_as_many,
    )
    yield _scalarizer(
        "dwa",
        "DWA",
        "Losses that fall slowly weigh more, from epoch to epoch.",
        _arxiv("End-to-End Multi-Task Learning with Attention", 2019, "1803.10704"),
        stateful=True,
        advanced_by="step",
    )
    yield _scalarizer(
        "famo",
        "FAMO",
        "Weights under which the logarithms of all losses fall equally fast.",
        _arxiv("FAMO: Fast Adaptive Multitask Optimization", 2023, "2306.03792"),
        stateful=True,
        positive=True,
        surrogate=True,
        advanced_by="update",
    )
    yield _scalarizer(
        "chebyshev",
        "Chebyshev",
        "Largest weighted distance from a reference point.",
        Reference(
            title="Nonlinear Multiobjective Optimization",
            year=1999,
            url="https://link.springer.com/book/10.1007/978-1-4615-5563-6",
        ),
    )
    yield _scalarizer(
        "stch",
        "STCH",
        "Smooth form of the largest weighted distance from a reference point.",
        _arxiv(
            "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", 2024, "2402.19078"
        ),
    )
    yield _scalarizer(
        "pbi",
        "PBI",
        "Progress along a ray of preferences, and a penalty on leaving it.",
        Reference(
            title="MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
            year=2007,
            url="https://ieeexplore.ieee.org/document/4358754",
        ),
    )
    yield _scalarizer(
        "cosmos",
        "COSMOS",
        "Weighted sum with a reward for losses in the direction of preferences.",
        _arxiv(
            "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
            2021,
            "2103.13392",
        ),
    )


def _as_many(m: int) -> dict[str, Any]:
    return {"n_losses": m}


def _solver(problem: str, class_name: str, summary: str, name: str = "native") -> SolverSpec:
    factory = f"{_PACKAGE}._solvers:{class_name}"
    return SolverSpec(name=name, problem=problem, summary=summary, factory=factory, api_version=1)


@hookimpl
def jdcore_solvers() -> Iterator[SolverSpec]:
    by_pivoting = "Exact and scale-free, by block pivoting in numpy."
    by_lcps = "Exact and scale-free, by LCPs for the level of improvement, in numpy."
    by_newton = "Exact and scale-free, by damped Newton steps in numpy."
    published = "The published procedure for deep networks: approximate, stops by its arguments."
    yield _solver("dual_cone", "NativeDualConeSolver", by_pivoting)
    yield _solver("min_norm", "NativeMinNormSolver", by_pivoting)
    yield _solver("min_norm", "FrankWolfeSolver", published, "frank_wolfe")
    yield _solver("conflict_averse", "NativeConflictAverseSolver", by_lcps)
    yield _solver("fair_allocation", "NativeFairAllocationSolver", by_newton)
    yield _solver("nash_bargaining", "NativeNashBargainingSolver", by_newton)
