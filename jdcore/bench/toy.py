"""
The toy problem of CAGrad, Nash-MTL and FAMO: two losses of two parameters, five starts.

With t = tanh(x2)::

    f1 = log max(|0.5 (-x1 - 7) + t|, 5e-6) + 6      f2 = log max(|0.5 (-x1 + 3) - t + 2|, 5e-6) + 6
    g1 = ((-x1 + 7)² + 0.1 (-x2 - 8)²) / 10 - 20     g2 = ((-x1 - 7)² + 0.1 (-x2 - 8)²) / 10 - 20
    c1 = max(tanh(x2 / 2), 0)                        c2 = max(tanh(-x2 / 2), 0)
    L1 = 0.1 (f1 c1 + g1 c2)                         L2 = f2 c1 + g2 c2

Constants as in `Nash-MTL <https://arxiv.org/pdf/2202.01017>`_: Adam at 1e-3, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from attrs import frozen
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped, unused-ignore]

from jdcore.bench.outcome import Experiment, Outcome, Settings, Table, follow, planar, without
from jdcore.errors import JDCoreError
from jdcore.monitor.plots import pareto_front
from jdcore.protocols import Aggregator
from jdcore.registry import describe

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1
"""Factor of the first loss."""

_FLOOR = 5e-6
_RATE = 1e-3
_STEPS, _QUICK_STEPS = 50_000, 600
_EVERY = 100  # steps between two looks at the distance to the front
_NEAR = 0.01
_SHOWN = ("mean", "mgda", "nash_mtl", "upgrad")


def evaluate(x1: float, x2: float) -> tuple[tuple[float, float], list[list[float]]]:
    """Both losses, and their gradients as rows."""
    t = math.tanh(x2)
    slope = 1.0 - t * t
    u1, u2 = 0.5 * (-x1 - 7.0) + t, 0.5 * (-x1 + 3.0) - t + 2.0
    f1, f2 = (math.log(max(abs(u), _FLOOR)) + 6.0 for u in (u1, u2))
    i1, i2 = (1.0 / u if abs(u) >= _FLOOR else 0.0 for u in (u1, u2))
    g1, g2 = (((s - x1) ** 2 + 0.1 * (x2 + 8.0) ** 2) / 10.0 - 20.0 for s in (7.0, -7.0))
    h = math.tanh(0.5 * x2)
    c1, c2 = max(h, 0.0), max(-h, 0.0)
    # torch.clamp passes the gradient on at its bound, so both slopes count at x2 = 0.
    d = 0.5 * (1.0 - h * h)
    d1, d2 = (d if h >= 0.0 else 0.0), (-d if h <= 0.0 else 0.0)
    b = 0.02 * (x2 + 8.0)
    first = [
        SCALE * (-0.5 * i1 * c1 + 0.2 * (x1 - 7.0) * c2),
        SCALE * (slope * i1 * c1 + f1 * d1 + b * c2 + g1 * d2),
    ]
    second = [
        -0.5 * i2 * c1 + 0.2 * (x1 + 7.0) * c2,
        -slope * i2 * c1 + f2 * d1 + b * c2 + g2 * d2,
    ]
    return (SCALE * (f1 * c1 + g1 * c2), f2 * c1 + g2 * c2), [first, second]


def front(count: int = 501) -> NDArray[np.float64]:
    """
    Points [count, 2] of the Pareto front in the space of the losses, by search.

    Where the front is, c1 is zero; x1 is then where the weighted squares are smallest, and x2
    is between -8.435 and -8.355.
    """
    return np.array([_best(weight) for weight in np.linspace(0.0, 1.0, count)])


def _best(weight: float) -> tuple[float, float]:
    x1 = 7.0 * (2.0 * weight - 1.0)

    def value(x2: float) -> float:
        (first, second), _ = evaluate(x1, x2)
        return weight * first / SCALE + (1.0 - weight) * second

    # By search in one dimension only, as the other one is known.
    found = minimize_scalar(value, bounds=(-10.0, -6.0), method="bounded", options={"xatol": 1e-9})
    return evaluate(x1, float(found.x))[0]


@frozen(eq=False)
class Descent:
    """Losses [k, 2] on the way, the step at which the front was reached (or None), the last gap."""

    losses: NDArray[np.float64]
    reached: int | None
    gap: float


def descend(
    aggregator: Aggregator, start: Sequence[float], steps: int, curve: NDArray[np.float64]
) -> Descent:
    """Adam (betas 0.9 and 0.999, eps 1e-8) along the aggregated gradient, in plain floats."""
    x, first, second = list(start), [0.0, 0.0], [0.0, 0.0]
    decay1, decay2 = 1.0, 1.0
    path, reached = [], None
    for step in range(steps + 1):
        losses, rows = evaluate(*x)
        if step % _EVERY == 0:
            path.append(losses)
            if reached is None and distance(losses, curve) < _NEAR:
                reached = step
        if step == steps:
            break
        # In plain floats but for the method: autograd and Adam would take most of the time.
        jacobian = torch.tensor(rows, dtype=torch.float64)
        gradient = follow(aggregator, jacobian, torch.tensor(losses, dtype=torch.float64)).tolist()
        decay1, decay2 = decay1 * 0.9, decay2 * 0.999
        for i, g in enumerate(gradient):
            first[i] += 0.1 * (g - first[i])
            second[i] += 0.001 * (g * g - second[i])
            scale = math.sqrt(second[i] / (1.0 - decay2)) + 1e-8
            x[i] -= _RATE * first[i] / (1.0 - decay1) / scale
    return Descent(np.array(path), reached, distance(path[-1], curve))


def distance(losses: Sequence[float], curve: NDArray[np.float64]) -> float:
    """Distance to the nearest point of the front, in the space of the losses."""
    return float(np.linalg.norm(curve - np.asarray(losses), axis=1).min())


def _runs(settings: Settings) -> Iterator[tuple[str, int]]:
    for name in settings.names(planar):
        yield from product([name], range(settings.seeds if describe(name).stochastic else 1))


def _work(settings: Settings) -> int:
    return len(STARTS) * sum(1 for _ in _runs(settings))


def _run(settings: Settings, advance: Callable[[], None]) -> Outcome:
    curve = front()
    steps = _QUICK_STEPS if settings.quick else _STEPS
    found: dict[str, list[list[Descent]]] = {}
    refused: dict[str, JDCoreError] = {}
    for name, seed in _runs(settings):
        torch.manual_seed(seed)
        descents = []
        for start in STARTS:
            try:
                descents.append(descend(planar(name), start, steps, curve))
            except JDCoreError as error:  # such as for losses that are not positive
                refused[name] = error
            advance()
        if name not in refused:
            found.setdefault(name, []).append(descents)
    return Outcome(
        tables=(_table(found, refused, steps),),
        data={name: [_plain(seed) for seed in seeds] for name, seeds in found.items()},
        picture=lambda: _picture(found, curve),
    )


def _table(
    found: dict[str, list[list[Descent]]], refused: dict[str, JDCoreError], steps: int
) -> Table:
    rows = []
    for name, seeds in found.items():
        arrived = sum(d.reached is not None for descents in seeds for d in descents) / len(seeds)
        cells = (_steps_or_gap([s[i] for s in seeds]) for i in range(len(STARTS)))
        rows.append((describe(name).class_name, *cells, f"{arrived:g} of {len(STARTS)}"))
    return Table(
        title=f"Toy problem: steps of {steps} until the front is nearer than {_NEAR}",
        columns=("method", *(f"start {i + 1}" for i in range(len(STARTS))), "arrives"),
        rows=tuple(rows),
        note="In brackets, the gap at the end of a run that does not arrive. Nash-MTL's paper: "
        "Adam on the mean fails from one of the five starts, Nash-MTL from none."
        + without(refused),
    )


def _steps_or_gap(descents: Sequence[Descent]) -> str:
    reached = [d.reached for d in descents if d.reached is not None]
    if len(reached) < len(descents):
        return f"({np.mean([d.gap for d in descents]):.2f})"
    return f"{np.mean(reached):.0f}"


def _plain(descents: Sequence[Descent]) -> list[dict[str, object]]:
    return [
        {"start": start, "reached": d.reached, "gap": d.gap, "end": d.losses[-1].tolist()}
        for start, d in zip(STARTS, descents, strict=True)
    ]


def _picture(found: dict[str, list[list[Descent]]], curve: NDArray[np.float64]) -> Axes:
    shown = [name for name in _SHOWN if name in found] or list(found)[:4]
    paths = {describe(n).class_name: [d.losses for d in found[n][0]] for n in shown}
    axes = pareto_front(paths, front=curve)
    axes.set_title("Toy problem: from five starts (open circles) in the space of the losses")
    return axes


TOY = Experiment(
    name="toy",
    summary="two losses of two parameters from five starts (CAGrad, Nash-MTL, FAMO)",
    make=planar,
    work=_work,
    run=_run,
)
