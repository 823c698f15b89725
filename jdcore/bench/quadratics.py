"""
The quadratic problems of `Jacobian Descent for Multi-Objective Optimization
<https://arxiv.org/pdf/2406.16232>`_: element-wise (EWQ) and convex quadratic forms (CQF).

Loss i of x in the plane is ``(x - uᵢ)ᵀ Aᵢ (x - uᵢ)``. Plain gradient descent, float64, with the
learning rates of the paper for each method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from attrs import frozen
from matplotlib.axes import Axes
from torch import Tensor

from jdcore.bench.outcome import (
    Experiment,
    Outcome,
    Settings,
    Table,
    follow,
    planar,
    spread,
    without,
)
from jdcore.errors import JDCoreError
from jdcore.monitor.plots import trajectories
from jdcore.protocols import Aggregator
from jdcore.registry import describe

_MULTIPLIERS = {"nash_mtl": 2.0, "imtl_g": 2.0, "pcgrad": 0.5, "graddrop": 0.5}
"""Learning rates of the paper, relative to that of the other methods."""

_SHOWN = ("mean", "mgda", "nash_mtl", "upgrad")
# Nearer to stationarity than this, the share of conflicts would be one of rounding.
_CRITICAL = 1e-6


@frozen(kw_only=True, eq=False)
class Problem:
    """
    Two quadratic forms.

    :param matrices: A, float64 Tensor [2, 2, 2].
    :param centres: u, float64 Tensor [2, 2].
    """

    name: str
    matrices: Tensor
    centres: Tensor
    rate: float
    steps: int
    starts: tuple[tuple[float, float], ...]

    def losses(self, x: Tensor) -> Tensor:
        """Both losses at points [..., 2], as [..., 2]."""
        away = x[..., None, :] - self.centres
        return torch.einsum("...ia,iab,...ib->...i", away, self.matrices, away)

    def jacobian(self, x: Tensor) -> Tensor:
        """Gradients of both losses at a point [2], as rows."""
        return 2.0 * torch.einsum("iab,ib->ia", self.matrices, x - self.centres)

    def pareto_set(self, count: int = 2001) -> Tensor:
        """Points [count, 2] at which some convex combination of the gradients is zero."""
        # Not zero and one, where the matrix of EWQ is singular.
        w = torch.linspace(1e-9, 1.0 - 1e-9, count, dtype=torch.float64)
        weights = torch.stack([w, 1.0 - w], 1)
        total = torch.einsum("ki,iab->kab", weights, self.matrices)
        right = torch.einsum("ki,iab,ib->ka", weights, self.matrices, self.centres)
        points: Tensor = torch.linalg.solve(total, right)
        return points


def _rotated(angle: float, *scales: float) -> Tensor:
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    factor = turn @ torch.diag(torch.tensor(scales, dtype=torch.float64))
    return factor @ factor.T


def problems() -> tuple[Problem, Problem]:
    """Both problems with the constants of the paper."""
    return (
        Problem(
            name="EWQ",
            matrices=torch.diag_embed(torch.eye(2, dtype=torch.float64)),
            centres=torch.zeros(2, 2, dtype=torch.float64),
            rate=0.075,
            steps=50,
            starts=((3.0, -2.0), (0.0, -3.0), (-4.0, 4.0), (-3.0, 4.0), (-3.5, -0.75)),
        ),
        Problem(
            name="CQF",
            matrices=torch.stack(
                [_rotated(math.pi / 16, 1.0, 0.1), _rotated(-math.pi / 16, math.sqrt(3.0), 0.1)]
            ),
            centres=torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64),
            rate=0.05,
            steps=500,
            starts=((0.5, 0.5), (-1.0, 7.0), (0.0, 0.0), (1.0, 6.0)),
        ),
    )


@frozen(eq=False)
class Descent:
    """Points [steps + 1, 2], the last distance to the Pareto set, the share of conflicts."""

    path: Tensor
    gap: float
    conflicts: float


def descend(
    aggregator: Aggregator, problem: Problem, start: tuple[float, float], rate: float
) -> Descent:
    """Gradient descent along the aggregated gradient."""
    x = torch.tensor(start, dtype=torch.float64)
    path, conflicts = [x], 0
    for _ in range(problem.steps):
        rows = problem.jacobian(x)
        update = follow(aggregator, rows, problem.losses(x))
        conflicts += _conflicts(rows, update)
        x = x - rate * update
        path.append(x)
    gap = (problem.pareto_set() - x).norm(dim=1).min().item()
    return Descent(torch.stack(path), gap, conflicts / problem.steps)


def _conflicts(rows: Tensor, update: Tensor) -> bool:
    inner = rows @ update
    return _criticality(rows) > _CRITICAL and bool(
        (inner < -1e-6 * rows.norm(dim=1) * update.norm()).any()
    )


def _criticality(rows: Tensor) -> float:
    """Length of the shortest convex combination of two rows."""
    first, second = rows
    difference = first - second
    square = float(difference @ difference)
    share = 0.5 if square == 0.0 else min(max(float(-second @ difference) / square, 0.0), 1.0)
    return float((second + share * difference).norm())


def _runs(settings: Settings) -> Iterator[tuple[Problem, str, int]]:
    for problem in problems():
        for name in settings.names(planar):
            stochastic = describe(name).stochastic and not settings.quick
            for seed in range(settings.seeds if stochastic else 1):
                yield problem, name, seed


def _work(settings: Settings) -> int:
    return sum(1 for _ in _runs(settings))


def _run(settings: Settings, advance: Callable[[], None]) -> Outcome:
    found: dict[str, dict[str, list[Descent]]] = {p.name: {} for p in problems()}
    refused: dict[str, dict[str, JDCoreError]] = {p.name: {} for p in problems()}
    for problem, name, seed in _runs(settings):
        torch.manual_seed(seed)
        rate = problem.rate * _MULTIPLIERS.get(name, 1.0)
        try:
            descents = [descend(planar(name), problem, s, rate) for s in problem.starts]
            found[problem.name].setdefault(name, []).extend(descents)
        except JDCoreError as error:  # such as for losses that are zero
            refused[problem.name][name] = error
        advance()
    return Outcome(
        tables=tuple(_table(name, runs, refused[name]) for name, runs in found.items()),
        data={
            problem: {
                method: [{"gap": d.gap, "conflicts": d.conflicts} for d in descents]
                for method, descents in runs.items()
            }
            for problem, runs in found.items()
        },
        picture=lambda: _picture(found["CQF"]),
    )


def _table(problem: str, runs: dict[str, list[Descent]], refused: dict[str, JDCoreError]) -> Table:
    rows = [
        (
            describe(name).class_name,
            spread([d.gap for d in descents]),
            f"{max(d.gap for d in descents):.3f}",
            f"{np.mean([d.conflicts for d in descents]):.0%}",
        )
        for name, descents in runs.items()
    ]
    return Table(
        title=f"{problem}: distance to the Pareto set after the last step",
        columns=("method", "over the starts", "worst", "steps in conflict"),
        rows=tuple(rows),
        note="The paper shows trajectories, without figures: on both problems UPGrad is among the "
        "methods that arrive from every start and never conflict." + without(refused),
    )


def _picture(runs: dict[str, list[Descent]]) -> Axes:
    problem = problems()[1]
    shown = [name for name in _SHOWN if name in runs] or list(runs)[:4]
    paths = {
        describe(n).class_name: [d.path for d in runs[n][: len(problem.starts)]] for n in shown
    }
    axes = trajectories(
        paths,
        contours=lambda x, y: (
            problem.losses(torch.from_numpy(np.stack([x, y], -1))).mean(-1).numpy()
        ),
        front=problem.pareto_set(),
    )
    axes.set_title("CQF: paths from four starts (open circles), level lines of the mean")
    return axes


QUADRATICS = Experiment(
    name="quadratics",
    summary="element-wise and convex quadratic forms (UPGrad's paper)",
    make=planar,
    work=_work,
    run=_run,
)
