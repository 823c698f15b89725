"""
Time of the solver backends, side by side in one process.

    python -m tests.benchmarks.solvers [--m 2 4 8 32] [--problems dual_cone] [--json FILE]

Solvers are called on Gramians of float64 arrays, without what the methods around them do. Calls of
all backends of a problem alternate on the same Gramians, and medians are compared: absolute times
vary by a factor of two with the state of the machine, ratios do not. For ``cvxpy`` the table also
shows what a call would take if it built its program anew, and how much of a call is the solver's
own time, the rest being the way through cvxpy.
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
from jdcore.testing import family

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
        for gramian in problems:
            for name, call in calls.items():
                start = time.perf_counter()
                call(gramian)
                times[name].append(time.perf_counter() - start)
                if name == "cvxpy, built anew":
                    calls["cvxpy"](gramian)  # compile again, outside the clock
    for name, taken in times.items():
        yield Timing(problem, kind, m, name, 1e6 * statistics.median(taken))


def share_of_clarabel(m: int) -> float:
    """The part of a compiled call that is spent in CLARABEL, by its own account."""
    from jdplugins.cvxpy._programs import program

    call, [gramian] = _call("conflict_averse", "cvxpy"), gramians("gauss", m, 1)
    shares = []
    for _ in range(20):
        start = time.perf_counter()
        call(gramian)
        total = time.perf_counter() - start
        shares.append(program(m, levels=True)._problem.solver_stats.solve_time / total)
    return statistics.median(shares)


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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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
