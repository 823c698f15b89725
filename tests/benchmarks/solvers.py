"""
Time of the solver backends, side by side in one process.

    python -m tests.benchmarks.solvers [--m 2 4 8 32] [--problems dual_cone] [--json FILE]
    python -m tests.benchmarks.solvers --upgrad 64 128 256 512 [--device cuda]

Solvers are called on Gramians of float64 arrays, without what the methods around them do. Calls of
all backends of a problem alternate on the same Gramians, and medians are compared: absolute times
vary by a factor of two with the state of the machine, ratios do not. For ``cvxpy`` the table also
shows what a call would take if it built its program anew, and how much of a call is the solver's
own time, the rest being the way through cvxpy.

The second form times the projections of all rows by the native solver, as UPGrad asks for them with
one loss per sample: on the device that is given, for real Gramians of the losses of a perceptron
that is trained on scikit-learn's digits (one of them with few parameters, so that the rows depend
on each other), and for families of dependent rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, frozen

import jdcore
from jdcore.linalg import add_proximal, equilibrate, gramian, proximal_level
from jdcore.testing import family
from tests.plugins.standard.dependent_rows import KINDS as KINDS_OF_ROWS

KINDS = ("gauss", "conflict", "rankdef")
Call = Callable[[np.ndarray], Any]


@frozen
class Timing:
    """Median time of one backend on one kind of Gramian."""

    problem: str
    kind: str
    m: int
    solver: str
    microseconds: float


def calls_of(problem: str) -> dict[str, Call]:
    """What to time for a problem, by name; backends whose library is missing are left out."""
    calls: dict[str, Call] = {}
    for name in jdcore.list_solvers(problem)[problem]:
        if name == "qpsolvers":
            calls |= {f"qpsolvers:{v}": _call(problem, f"qpsolvers:{v}") for v in _qp_variants()}
        else:
            calls[name] = _call(problem, name)
    if "cvxpy" in calls:
        calls["cvxpy, built anew"] = _rebuilding(calls["cvxpy"])
    return calls


def _qp_variants() -> list[str]:
    import qpsolvers

    return [name for name in ("daqp", "quadprog") if name in qpsolvers.available_solvers]


def _call(problem: str, name: str) -> Call:
    solver = jdcore.get_solver(problem, name)
    if problem == "dual_cone":
        return lambda gramian: solver(gramian, np.eye(len(gramian)) / len(gramian))
    if problem == "conflict_averse":
        return lambda gramian: solver(gramian, 0.5)
    return lambda gramian: solver(gramian)


def _rebuilding(call: Call) -> Call:
    from jdplugins.cvxpy._programs import _PROGRAMS

    def rebuild(gramian: np.ndarray) -> Any:
        _PROGRAMS.program.cache_clear()
        return call(gramian)

    return rebuild


def gramians(kind: str, m: int, count: int = 3) -> list[np.ndarray]:
    drawn = [
        family(kind, m, 1000, generator=torch.Generator().manual_seed(seed))
        for seed in range(count)
    ]
    return [(J @ J.T).numpy() for J in drawn]


def measure(problem: str, kind: str, m: int, seconds: float) -> Iterator[Timing]:
    calls = calls_of(problem)
    problems = gramians(kind, m)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # compiles and imports what is compiled and imported once
        call(problems[0])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for given in problems:
            for name, call in calls.items():
                start = time.perf_counter()
                call(given)
                times[name].append(time.perf_counter() - start)
                if name == "cvxpy, built anew":
                    calls["cvxpy"](given)  # compile again, outside the clock
    for name, taken in times.items():
        yield Timing(problem, kind, m, name, 1e6 * statistics.median(taken))


def share_of_clarabel(m: int) -> float:
    """The part of a compiled call that is spent in CLARABEL, by its own account."""
    from jdplugins.cvxpy._programs import program

    call, [given] = _call("conflict_averse", "cvxpy"), gramians("gauss", m, 1)
    shares = []
    for _ in range(20):
        start = time.perf_counter()
        call(given)
        total = time.perf_counter() - start
        shares.append(program(m, levels=True)._problem.solver_stats.solve_time / total)
    return statistics.median(shares)


def real_gramian(m: int, steps: int, hidden: int = 64) -> torch.Tensor:
    """The Gramian of m losses of a perceptron after some steps of training on digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16.0
    net = torch.nn.Sequential(
        torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(steps):
        batch = torch.arange(step * 64, step * 64 + 64) % len(images)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    losses = torch.nn.functional.cross_entropy(net(images[:m]), labels[:m], reduction="none")
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return gramian(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))


def cosines(G: np.ndarray) -> torch.Tensor:
    """What UPGrad has solved of a Gramian of rows that were rounded to float32."""
    level = proximal_level(len(G), torch.float32)
    C = torch.from_numpy(equilibrate(add_proximal(G, level))[0])
    C.diagonal().fill_(1.0)
    return C


def dependent_gramian(kind: str, m: int) -> np.ndarray:
    rows = KINDS_OF_ROWS[kind](m, np.random.default_rng(0)).astype(np.float32).astype(np.float64)
    product: np.ndarray = rows @ rows.T
    return product


def measure_upgrad(m: int, device: str) -> None:
    """Print the time of all projections and the largest residual, line by line."""
    from jdplugins.standard._solvers._lcp import solve_lcps

    clock = time.thread_time if device == "cpu" else time.perf_counter
    cases = {kind: dependent_gramian(kind, m) for kind in KINDS_OF_ROWS}
    cases |= {f"digits after {steps} steps": real_gramian(m, steps).numpy() for steps in (20, 400)}
    cases["digits, 160 parameters"] = real_gramian(m, 400, hidden=2).numpy()
    independent = None
    for name, G in cases.items():
        C = cosines(G).to(device)
        taken = []
        for _ in range(3):
            start = clock()
            _, residuals = solve_lcps(C, C)
            worst = float(residuals.max())  # waits for the device
            taken.append(1e3 * (clock() - start))
        median = statistics.median(taken)
        independent = independent or median  # the first case
        print(
            f"m={m} {name}: {median:.1f} ms, {median / independent:.1f} of independent rows, "
            f"residual {worst:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--m", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument(
        "--problems",
        nargs="+",
        default=["dual_cone", "conflict_averse", "nash_bargaining"],
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="per line of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--upgrad", type=int, nargs="+", metavar="M", help="the second form")
    parser.add_argument("--device", default="cpu", help="of the second form")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.upgrad:
        for m in arguments.upgrad:
            measure_upgrad(m, arguments.device)
        return
    warnings.simplefilter("ignore", jdcore.UnsolvedWarning)
    timings = []
    for problem in arguments.problems:
        for kind in KINDS:
            for m in arguments.m:
                found = list(measure(problem, kind, m, arguments.seconds))
                timings += found
                times = "  ".join(f"{t.solver} {t.microseconds:.0f}" for t in found)
                print(f"{problem} {kind} m={m} [us]: {times}", flush=True)
    if "cvxpy" in jdcore.list_solvers("conflict_averse")["conflict_averse"]:
        for m in arguments.m:
            print(f"cvxpy m={m}: {share_of_clarabel(m):.0%} of a call is CLARABEL's own time")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(t) for t in timings]))


if __name__ == "__main__":
    main()
