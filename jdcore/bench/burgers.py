"""
Burgers' equation by a physics-informed network, as in the notebook of `ConFIG
<https://arxiv.org/pdf/2408.11104>`_.

``u_t + u u_x = ν u_xx`` with ν = 0.01/π for x in [-1, 1], t in [0, 1]; ``u(x, 0) = -sin(π x)`` and
``u(±1, t) = 0``. Three losses (equation, boundary, start), unweighted, Adam at 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from attrs import frozen
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats.qmc import LatinHypercube  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from jdcore.autojac import backward, jac_to_grad
from jdcore.bench.outcome import Experiment, Outcome, Settings, Table, spread
from jdcore.demo.command import make_aggregator
from jdcore.monitor import History, record
from jdcore.monitor.plots._style import new_axes, styled
from jdcore.registry import describe

VISCOSITY = 0.01 / math.pi

_WIDTHS = (2, 50, 50, 50, 50, 50, 1)
_INSIDE, _EDGE = 2000, 50  # points of the equation; of the boundary and of the start
_RATE = 1e-4
_STEPS, _QUICK_STEPS = 5000, 20
_EVERY = 100  # steps between two looks at the error
_DEFAULT = ("mean", "config", "upgrad")
_make = partial(make_aggregator, tasks=3)
_PUBLISHED = {"mean": 0.0310, "config": 0.00638}


def exact(x: NDArray[np.float64], t: NDArray[np.float64], nodes: int = 100) -> NDArray[np.float64]:
    """
    The solution by the transformation of Cole and Hopf, with Gauss-Hermite quadrature.

    100 nodes give it to 2e-15, 50 to 2e-7.

    :param x: Places in [-1, 1], of any shape.
    :param t: Times in [0, 1], of the same shape.
    """
    points, weights = np.polynomial.hermite.hermgauss(nodes)
    moved = x[..., None] - 2.0 * np.sqrt(VISCOSITY * t)[..., None] * points
    exponent = -np.cos(np.pi * moved) / (2.0 * np.pi * VISCOSITY)
    density = np.exp(exponent - exponent.max(-1, keepdims=True)) * weights
    solution: NDArray[np.float64] = -(np.sin(np.pi * moved) * density).sum(-1) / density.sum(-1)
    return solution


@cache
def grid() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and the solution on 100 x 256 points, float32."""
    places = np.linspace(-1.0 + 1.0 / 256, 1.0 - 1.0 / 256, 256)
    x, t = np.meshgrid(places, np.linspace(0.0, 1.0, 100))
    x_points, t_points, solution = (
        torch.tensor(values, dtype=torch.float32) for values in (x, t, exact(x, t))
    )
    return x_points, t_points, solution


class Network(nn.Module):
    """A perceptron u(x, t) with five layers of 50 units and tanh."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_WIDTHS):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_normal_(linear.weight)
            nn.init.constant_(linear.bias, 0.001)
            layers += [linear, nn.Tanh()]
        # Without the last tanh: the values of u are not bounded by it.
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Values of the shape of x and t."""
        values: Tensor = self.layers(torch.stack([x, t], -1))
        return values[..., 0]


class Points:
    """Latin hypercube samples, new ones at each step."""

    def __init__(self, seed: int) -> None:
        self._line = LatinHypercube(d=1, seed=seed)
        self._plane = LatinHypercube(d=2, seed=seed)

    def losses(self, network: Network) -> Tensor:
        """Mean squares of what is left of the equation, at the boundary and at the start."""
        start = self._drawn(self._line, _EDGE)[:, 0] * 2.0 - 1.0
        wrong_start = network(start, torch.zeros_like(start)) + torch.sin(math.pi * start)
        time = self._drawn(self._line, _EDGE)[:, 0]
        side = torch.ones(_EDGE).index_fill(0, torch.arange(_EDGE // 2), -1.0)
        inside = self._drawn(self._plane, _INSIDE)
        x = (inside[:, 0] * 2.0 - 1.0).requires_grad_()
        t = inside[:, 1].clone().requires_grad_()
        left = residual(network, x, t)
        parts = (left, network(side, time), wrong_start)
        return torch.stack([part.square().mean() for part in parts])

    @staticmethod
    def _drawn(sampler: LatinHypercube, count: int) -> Tensor:
        return torch.tensor(sampler.random(count), dtype=torch.float32)


def residual(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """What is left of the equation at points [k] that require grad."""
    u = network(x, t)
    # A value depends on its own point alone, so the sum of all has their derivatives as its
    # gradient.
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    [u_xx] = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - VISCOSITY * u_xx


@frozen(eq=False)
class Training:
    """Mean squared errors on the grid, the steps they follow, the share of steps in conflict."""

    errors: list[float]
    steps: list[int]
    conflicts: float


def train(name: str, seed: int, steps: int) -> Training:
    """Train a new network; the seed gives its first weights and all points."""
    torch.manual_seed(seed)
    network, points, aggregator = Network(), Points(seed), _make(name)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    every, errors = min(_EVERY, steps), [_error(network)]
    with record(complete=True) as history:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            losses = points.losses(network)
            backward(losses)
            jac_to_grad(parameters, aggregator, losses=losses)
            optimizer.step()
            if step % every == 0:
                errors.append(_error(network))
    seen = list(range(0, steps + 1, every))
    return Training(errors, seen, _conflicting(history))


@torch.no_grad()
def _error(network: Network) -> float:
    x, t, solution = grid()
    return float((network(x, t) - solution).square().mean())


def _conflicting(history: History) -> float:
    return float(np.mean([bool(step.conflicts) for step in history]))


def _work(settings: Settings) -> int:
    return len(settings.runs(_make, _DEFAULT))


def _run(settings: Settings, advance: Callable[[], None]) -> Outcome:
    steps = _QUICK_STEPS if settings.quick else _STEPS
    found: dict[str, list[Training]] = {}
    for name, seed in settings.runs(_make, _DEFAULT):
        found.setdefault(name, []).append(train(name, seed, steps))
        advance()
    return Outcome(
        tables=(_table(found, steps),),
        data={
            name: [{"errors": t.errors, "conflicts": t.conflicts} for t in trainings]
            for name, trainings in found.items()
        },
        picture=lambda: _picture(found),
    )


def _table(found: dict[str, list[Training]], steps: int) -> Table:
    rows = [
        (
            describe(name).class_name,
            spread([min(t.errors) for t in trainings], 4),
            f"{_PUBLISHED[name]:.4f}" if name in _PUBLISHED else "-",
            f"{np.mean([t.conflicts for t in trainings]):.0%}",
        )
        for name, trainings in found.items()
    ]
    return Table(
        title=f"Burgers' equation: least mean squared error within {steps} steps of Adam",
        columns=("method", "error", "published", "updates in conflict"),
        rows=tuple(rows),
        note="Published: the notebook of ConFIG, one seed, tested against data that differ from "
        "the exact solution by 1.6e-4. Errors here are against the exact solution.",
    )


def _picture(found: dict[str, list[Training]]) -> Axes:
    axes = new_axes((6.4, 4.0))
    for (name, trainings), dashes, colour in styled(found.items()):
        for index, training in enumerate(trainings):
            label = describe(name).class_name if index == 0 else None
            axes.semilogy(
                training.steps, training.errors, dashes, color=colour, lw=1.2, label=label
            )
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error")
    axes.set_title("Burgers' equation: error against the exact solution")
    axes.legend(frameon=False)
    return axes


BURGERS = Experiment(
    name="burgers",
    summary="a physics-informed network for Burgers' equation, three losses (ConFIG's notebook)",
    make=_make,
    work=_work,
    run=_run,
)
