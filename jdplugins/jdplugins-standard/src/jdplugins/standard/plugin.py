"""What this distribution provides. Imports neither torch nor any method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdcore import AggregatorSpec, Property, Reference, ScalarizerSpec, SolverSpec, hookimpl

_PACKAGE = "jdplugins.standard"

_JACOBIAN_DESCENT = Reference(
    title="Jacobian Descent for Multi-Objective Optimization",
    year=2024,
    url="https://arxiv.org/pdf/2406.16232",
)


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield AggregatorSpec(
        name="mean",
        summary="Mean of the rows: gradient descent on the mean of the losses.",
        weighting=f"{_PACKAGE}.mean:MeanWeighting",
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
            Property.DIFFERENTIABLE,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="upgrad",
        summary="Mean of the projections of all rows onto the dual cone.",
        weighting=f"{_PACKAGE}.upgrad:UPGradWeighting",
        reference=_JACOBIAN_DESCENT,
        properties=(
            Property.NON_CONFLICTING,
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="dualproj",
        summary="Projection of the mean of the rows onto the dual cone.",
        weighting=f"{_PACKAGE}.dualproj:DualProjWeighting",
        reference=Reference(
            title="Gradient Episodic Memory for Continual Learning",
            year=2017,
            url="https://arxiv.org/pdf/1706.08840",
        ),
        properties=(
            Property.NON_CONFLICTING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="mgda",
        summary="Shortest vector in the convex hull of the rows.",
        weighting=f"{_PACKAGE}.mgda:MGDAWeighting",
        reference=Reference(
            title="Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
            year=2012,
            url="https://www.sciencedirect.com/science/article/pii/S1631073X12000738",
        ),
        properties=(
            Property.NON_CONFLICTING,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="cagrad",
        summary="Best worst-case improvement within a ball around the mean of the rows.",
        weighting=f"{_PACKAGE}.cagrad:CAGradWeighting",
        reference=Reference(
            title="Conflict-Averse Gradient Descent for Multi-task Learning",
            year=2021,
            url="https://arxiv.org/pdf/2110.14048",
        ),
        properties=(
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        example=lambda m: {"c": 0.5},
        api_version=1,
    )
    yield AggregatorSpec(
        name="sum",
        summary="Sum of the rows: gradient descent on the sum of the losses.",
        weighting=f"{_PACKAGE}.sum:SumWeighting",
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
            Property.DIFFERENTIABLE,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="constant",
        summary="Weights chosen by the user: gradient descent on a weighted sum of the losses.",
        weighting=f"{_PACKAGE}.constant:ConstantWeighting",
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.SCALE_EQUIVARIANT,
            Property.DIFFERENTIABLE,
        ),
        example=_constant_weights,
        api_version=1,
    )
    yield AggregatorSpec(
        name="random",
        summary="Positive random weights that sum to 1, drawn anew at each call.",
        weighting=f"{_PACKAGE}.random:RandomWeighting",
        reference=Reference(
            title=(
                "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task "
                "Learning"
            ),
            year=2021,
            url="https://arxiv.org/pdf/2111.10603",
        ),
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.SCALE_EQUIVARIANT,
            Property.DIFFERENTIABLE,
        ),
        stochastic=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="nash_mtl",
        summary="Nash bargaining solution: the same relative gain for every objective.",
        weighting=f"{_PACKAGE}.nash_mtl:NashMTLWeighting",
        reference=Reference(
            title="Multi-Task Learning as a Bargaining Game",
            year=2022,
            url="https://arxiv.org/pdf/2202.01017",
        ),
        properties=(
            Property.NON_CONFLICTING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
        ),
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="pcgrad",
        summary="Each row projected off the rows it conflicts with, in random order; summed.",
        weighting=f"{_PACKAGE}.pcgrad:PCGradWeighting",
        reference=Reference(
            title="Gradient Surgery for Multi-Task Learning",
            year=2020,
            url="https://arxiv.org/pdf/2001.06782",
        ),
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.SCALE_EQUIVARIANT,
        ),
        stochastic=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="gradvac",
        summary="Pairs of rows brought to the cosine they have had on average; summed.",
        weighting=f"{_PACKAGE}.gradvac:GradVacWeighting",
        reference=Reference(
            title=(
                "Gradient Vaccine: Investigating and Improving Multi-task Optimization in "
                "Massively Multilingual Models"
            ),
            year=2021,
            url="https://arxiv.org/pdf/2010.05874",
        ),
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.SCALE_EQUIVARIANT,
        ),
        stateful=True,
        stochastic=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="imtl_g",
        summary="Equal projections of the update onto the directions of all rows.",
        weighting=f"{_PACKAGE}.imtl_g:IMTLGWeighting",
        reference=Reference(
            title="Towards Impartial Multi-task Learning",
            year=2021,
            url="https://discovery.ucl.ac.uk/id/eprint/10120667/",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        api_version=1,
    )
    yield AggregatorSpec(
        name="aligned_mtl",
        summary="Principal components of the Jacobian made equally long and orthogonal.",
        weighting=f"{_PACKAGE}.aligned_mtl:AlignedMTLWeighting",
        reference=Reference(
            title="Independent Component Alignment for Multi-Task Learning",
            year=2023,
            url="https://arxiv.org/pdf/2305.19000",
        ),
        properties=(
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="config",
        summary="Equal cosines with all rows, and the length they add up to.",
        weighting=f"{_PACKAGE}.config:ConFIGWeighting",
        reference=Reference(
            title="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
            year=2024,
            url="https://arxiv.org/pdf/2408.11104",
        ),
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        api_version=1,
    )
    yield AggregatorSpec(
        name="krum",
        summary="Mean of the rows closest to their neighbours, robust to adversarial rows.",
        weighting=f"{_PACKAGE}.krum:KrumWeighting",
        reference=Reference(
            title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            year=2017,
            url=(
                "https://proceedings.neurips.cc/paper/2017/file/"
                "f4b9ec30ad9f68f89b29639786cb62ef-Paper.pdf"
            ),
        ),
        properties=(Property.SCALE_EQUIVARIANT, Property.ROBUST),
        min_rows=4,
        example=lambda m: {"n_byzantine": 1},
        api_version=1,
    )
    yield AggregatorSpec(
        name="trimmed_mean",
        summary="Mean of each coordinate without its largest and smallest entries.",
        aggregator=f"{_PACKAGE}.trimmed_mean:TrimmedMean",
        reference=Reference(
            title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            year=2018,
            url="https://proceedings.mlr.press/v80/yin18a/yin18a.pdf",
        ),
        properties=(
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
            Property.ROBUST,
        ),
        min_rows=3,
        example=lambda m: {"trim_number": 1},
        api_version=1,
    )
    yield AggregatorSpec(
        name="graddrop",
        summary="Each coordinate keeps its positive or its negative entries, at random.",
        aggregator=f"{_PACKAGE}.graddrop:GradDrop",
        reference=Reference(
            title="Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
            year=2020,
            url="https://arxiv.org/pdf/2010.06808",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        stochastic=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="modo",
        summary="One step per call towards the shortest combination, of two independent batches.",
        weighting=f"{_PACKAGE}.modo:MoDoWeighting",
        reference=Reference(
            title=(
                "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization "
                "and Conflict-Avoidance"
            ),
            year=2024,
            url="https://www.jmlr.org/papers/volume25/23-1287/23-1287.pdf",
        ),
        properties=(Property.PERMUTATION_INVARIANT,),
        cross_gramian=True,
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="sdmgrad",
        summary="Few steps per call towards a short update near a preferred one, of two batches.",
        weighting=f"{_PACKAGE}.sdmgrad:SDMGradWeighting",
        reference=Reference(
            title=(
                "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic "
                "Algorithms"
            ),
            year=2023,
            url="https://arxiv.org/pdf/2305.18409",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        cross_gramian=True,
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="moco",
        summary="Rows tracked over time, and one step per call towards their shortest mixture.",
        aggregator=f"{_PACKAGE}.moco:MoCo",
        reference=Reference(
            title=(
                "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent "
                "Approach"
            ),
            year=2023,
            url="https://openreview.net/pdf?id=dLAYGdKTi2",
        ),
        properties=(Property.PERMUTATION_INVARIANT,),
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="db_mtl",
        summary="Gradients of the logarithms of the losses, averaged over time, of equal length.",
        aggregator=f"{_PACKAGE}.db_mtl:DBMTL",
        reference=Reference(
            title="Dual-Balancing for Multi-Task Learning",
            year=2023,
            url="https://arxiv.org/pdf/2308.12029",
        ),
        properties=(
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        losses=True,
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="excess_mtl",
        summary="Weights that grow with the excess risk: robust to objectives with noisy labels.",
        aggregator=f"{_PACKAGE}.excess_mtl:ExcessMTL",
        reference=Reference(
            title="Robust Multi-Task Learning with Excess Risks",
            year=2024,
            url="https://proceedings.mlr.press/v235/he24n.html",
        ),
        properties=(
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="gradnorm",
        summary="Weights under which objectives that train slowly have the longer gradients.",
        weighting=f"{_PACKAGE}.gradnorm:GradNormWeighting",
        reference=Reference(
            title=(
                "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask "
                "Networks"
            ),
            year=2018,
            url="https://arxiv.org/pdf/1711.02257",
        ),
        properties=(
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        losses=True,
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="cr_mogm",
        summary="Another method, with momentum on its weights.",
        weighting=f"{_PACKAGE}.cr_mogm:CRMOGMWeighting",
        reference=Reference(
            title=(
                "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond"
            ),
            year=2022,
            url=(
                "https://proceedings.neurips.cc/paper_files/paper/2022/file/"
                "f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf"
            ),
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        wrapper=True,
        stateful=True,
        example=_upgrad_weighting,
        api_version=1,
    )
    yield AggregatorSpec(
        name="periodic",
        summary="Another method, with new weights at every k-th call only.",
        weighting=f"{_PACKAGE}.periodic:PeriodicWeighting",
        reference=Reference(
            title="Multi-Task Learning as a Bargaining Game",
            year=2022,
            url="https://arxiv.org/pdf/2202.01017",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        wrapper=True,
        stateful=True,
        example=lambda m: {**_upgrad_weighting(m), "every": 2},
        api_version=1,
    )
    yield AggregatorSpec(
        name="row_momentum",
        summary="Another method, on moving averages of the rows.",
        aggregator=f"{_PACKAGE}.row_momentum:RowMomentum",
        reference=Reference(
            title=(
                "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent "
                "Approach"
            ),
            year=2023,
            url="https://openreview.net/pdf?id=dLAYGdKTi2",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        wrapper=True,
        stateful=True,
        example=_upgrad_weighting,
        api_version=1,
    )
    yield AggregatorSpec(
        name="row_normalized",
        summary="Another method, on rows divided by their norms, their losses, or both.",
        aggregator=f"{_PACKAGE}.row_normalized:RowNormalized",
        reference=Reference(
            title="Multi-Task Learning as Multi-Objective Optimization",
            year=2018,
            url="https://arxiv.org/pdf/1810.04650",
        ),
        properties=(Property.NON_CONFLICTING, Property.PERMUTATION_INVARIANT),
        wrapper=True,
        stateful=True,
        example=_upgrad,
        api_version=1,
    )
    yield AggregatorSpec(
        name="present_tasks",
        summary="Another method, on those objectives only that are present in the batch.",
        aggregator=f"{_PACKAGE}.present_tasks:PresentTasks",
        properties=(
            Property.NON_CONFLICTING,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        wrapper=True,
        stateful=True,
        example=_upgrad,
        api_version=1,
    )
    yield AggregatorSpec(
        name="per_group",
        summary="Another method, on each group of parameters by itself.",
        aggregator=f"{_PACKAGE}.per_group:PerGroup",
        properties=(
            Property.NON_CONFLICTING,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
        ),
        wrapper=True,
        stateful=True,
        example=lambda m: {**_upgrad(m), "columns": (3, 1)},
        expected_failures={
            "handles_no_columns": "groups are given by their numbers of columns",
            "handles_degenerate_rows": "groups of its example have more than a single column",
        },
        api_version=1,
    )
    yield AggregatorSpec(
        name="dcgd",
        summary="The sum of two groups of rows, brought into the dual cone of their sums.",
        weighting=f"{_PACKAGE}.dcgd:DCGDWeighting",
        reference=Reference(
            title="Dual Cone Gradient Descent for Training Physics-Informed Neural Networks",
            year=2024,
            url="https://arxiv.org/pdf/2409.18426",
        ),
        properties=(Property.SCALE_EQUIVARIANT,),
        api_version=1,
    )
    yield AggregatorSpec(
        name="conic_grad",
        summary="Best worst case in a cone around the mean of the rows, as long as the mean.",
        weighting=f"{_PACKAGE}.conic_grad:ConicGradWeighting",
        reference=Reference(
            title="Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone",
            year=2025,
            url="https://arxiv.org/pdf/2502.00217",
        ),
        properties=(Property.PERMUTATION_INVARIANT, Property.SCALE_EQUIVARIANT),
        api_version=1,
    )
    yield AggregatorSpec(
        name="pcd",
        summary="The first row, changed so that all other objectives make some progress.",
        weighting=f"{_PACKAGE}.pcd:PCDWeighting",
        reference=Reference(
            title=(
                "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical "
                "Multi-Objective Optimization"
            ),
            year=2026,
            url="https://arxiv.org/pdf/2606.29521",
        ),
        properties=(Property.SCALE_EQUIVARIANT,),
        stateful=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="epo",
        summary="Descent towards the Pareto optimum where losses are as a preference wants them.",
        weighting=f"{_PACKAGE}.epo:EPOWeighting",
        reference=Reference(
            title=(
                "Multi-Task Learning with User Preferences: Gradient Descent with Controlled "
                "Ascent in Pareto Optimization"
            ),
            year=2020,
            url="https://proceedings.mlr.press/v119/mahapatra20a/mahapatra20a.pdf",
        ),
        properties=(Property.SCALE_EQUIVARIANT,),
        losses=True,
        api_version=1,
    )
    yield AggregatorSpec(
        name="fairgrad",
        summary="Alpha-fair gains: from the largest sum over Nash bargaining to the worst case.",
        weighting=f"{_PACKAGE}.fairgrad:FairGradWeighting",
        reference=Reference(
            title="Fair Resource Allocation in Multi-Task Learning",
            year=2024,
            url="https://arxiv.org/pdf/2402.15638",
        ),
        properties=(
            Property.NON_CONFLICTING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
        ),
        example=lambda m: {"alpha": 2.0},
        api_version=1,
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


@hookimpl
def jdcore_scalarizers() -> Iterator[ScalarizerSpec]:
    yield ScalarizerSpec(
        name="mean",
        summary="Mean of the losses.",
        scalarizer=f"{_PACKAGE}.scalarization.mean:Mean",
        api_version=1,
    )
    yield ScalarizerSpec(
        name="sum",
        summary="Sum of the losses.",
        scalarizer=f"{_PACKAGE}.scalarization.sum:Sum",
        api_version=1,
    )
    yield ScalarizerSpec(
        name="constant",
        summary="Weighted sum of the losses, with weights chosen by the user.",
        scalarizer=f"{_PACKAGE}.scalarization.constant:Constant",
        example=_constant_weights,
        api_version=1,
    )
    yield ScalarizerSpec(
        name="random",
        summary="Weighted sum of the losses, with random weights drawn anew at each call.",
        scalarizer=f"{_PACKAGE}.scalarization.random:Random",
        reference=Reference(
            title=(
                "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task "
                "Learning"
            ),
            year=2021,
            url="https://arxiv.org/pdf/2111.10603",
        ),
        stochastic=True,
        api_version=1,
    )
    yield ScalarizerSpec(
        name="geometric_mean",
        summary="Geometric mean of the losses.",
        scalarizer=f"{_PACKAGE}.scalarization.geometric_mean:GeometricMean",
        reference=Reference(
            title=(
                "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for "
                "Multi-Task Learning"
            ),
            year=2019,
            url="https://arxiv.org/pdf/1904.08492",
        ),
        positive=True,
        aliases=("gls",),
        api_version=1,
    )
    yield ScalarizerSpec(
        name="uw",
        summary="Losses divided by learned variances.",
        scalarizer=f"{_PACKAGE}.scalarization.uw:UW",
        reference=Reference(
            title=(
                "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and "
                "Semantics"
            ),
            year=2018,
            url="https://arxiv.org/pdf/1705.07115",
        ),
        trainable=True,
        example=_as_many,
        api_version=1,
    )
    yield ScalarizerSpec(
        name="imtl_l",
        summary="Losses with learned scales that make all of them equally large.",
        scalarizer=f"{_PACKAGE}.scalarization.imtl_l:IMTLL",
        reference=Reference(
            title="Towards Impartial Multi-task Learning",
            year=2021,
            url="https://discovery.ucl.ac.uk/id/eprint/10120667/",
        ),
        trainable=True,
        example=_as_many,
        api_version=1,
    )
    yield ScalarizerSpec(
        name="dwa",
        summary="Losses that fall slowly weigh more, from epoch to epoch.",
        scalarizer=f"{_PACKAGE}.scalarization.dwa:DWA",
        reference=Reference(
            title="End-to-End Multi-Task Learning with Attention",
            year=2019,
            url="https://arxiv.org/pdf/1803.10704",
        ),
        stateful=True,
        advanced_by="step",
        api_version=1,
    )
    yield ScalarizerSpec(
        name="famo",
        summary="Weights under which the logarithms of all losses fall equally fast.",
        scalarizer=f"{_PACKAGE}.scalarization.famo:FAMO",
        reference=Reference(
            title="FAMO: Fast Adaptive Multitask Optimization",
            year=2023,
            url="https://arxiv.org/pdf/2306.03792",
        ),
        positive=True,
        stateful=True,
        surrogate=True,
        advanced_by="update",
        api_version=1,
    )
    yield ScalarizerSpec(
        name="chebyshev",
        summary="Largest weighted distance from a reference point.",
        scalarizer=f"{_PACKAGE}.scalarization.chebyshev:Chebyshev",
        reference=Reference(
            title="Nonlinear Multiobjective Optimization",
            year=1999,
            url="https://link.springer.com/book/10.1007/978-1-4615-5563-6",
        ),
        api_version=1,
    )
    yield ScalarizerSpec(
        name="stch",
        summary="Smooth form of the largest weighted distance from a reference point.",
        scalarizer=f"{_PACKAGE}.scalarization.stch:STCH",
        reference=Reference(
            title="Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
            year=2024,
            url="https://arxiv.org/pdf/2402.19078",
        ),
        api_version=1,
    )
    yield ScalarizerSpec(
        name="pbi",
        summary="Progress along a ray of preferences, and a penalty on leaving it.",
        scalarizer=f"{_PACKAGE}.scalarization.pbi:PBI",
        reference=Reference(
            title=("MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition"),
            year=2007,
            url="https://ieeexplore.ieee.org/document/4358754",
        ),
        api_version=1,
    )
    yield ScalarizerSpec(
        name="cosmos",
        summary="Weighted sum with a reward for losses in the direction of preferences.",
        scalarizer=f"{_PACKAGE}.scalarization.cosmos:COSMOS",
        reference=Reference(
            title="Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
            year=2021,
            url="https://arxiv.org/pdf/2103.13392",
        ),
        api_version=1,
    )


def _as_many(m: int) -> dict[str, Any]:
    return {"n_losses": m}


@hookimpl
def jdcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec(
        name="native",
        problem="dual_cone",
        summary="Exact and scale-free, by block pivoting in numpy.",
        factory=f"{_PACKAGE}._solvers:NativeDualConeSolver",
        api_version=1,
    )
    yield SolverSpec(
        name="native",
        problem="min_norm",
        summary="Exact and scale-free, by block pivoting in numpy.",
        factory=f"{_PACKAGE}._solvers:NativeMinNormSolver",
        api_version=1,
    )
    yield SolverSpec(
        name="frank_wolfe",
        problem="min_norm",
        summary="The published procedure for deep networks: approximate, stops by its arguments.",
        factory=f"{_PACKAGE}._solvers:FrankWolfeSolver",
        api_version=1,
    )
    yield SolverSpec(
        name="native",
        problem="conflict_averse",
        summary="Exact and scale-free, by LCPs for the level of improvement, in numpy.",
        factory=f"{_PACKAGE}._solvers:NativeConflictAverseSolver",
        api_version=1,
    )
    yield SolverSpec(
        name="native",
        problem="fair_allocation",
        summary="Exact and scale-free, by damped Newton steps in numpy.",
        factory=f"{_PACKAGE}._solvers:NativeFairAllocationSolver",
        api_version=1,
    )
    yield SolverSpec(
        name="native",
        problem="nash_bargaining",
        summary="Exact and scale-free, by damped Newton steps in numpy.",
        factory=f"{_PACKAGE}._solvers:NativeNashBargainingSolver",
        api_version=1,
    )
