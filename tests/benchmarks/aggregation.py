"""
Time of aggregation, side by side with torchjd in one process.

    python -m tests.benchmarks.aggregation [--methods upgrad mgda] [--m 2 8 32] [--json FILE]

Every call goes end to end, from a float32 Jacobian to the update. Calls of both libraries alternate
on the same Jacobians, and medians are compared: absolute times vary by a factor of two with the
state of the machine, ratios do not. Only the time of the calling thread counts, not what other
processes do. The peer is imported here only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor

import jdcore
from jdcore.testing import family

Aggregator = Callable[[Tensor], Tensor]
SIZES = (2, 3, 4, 8, 16, 32, 64, 128)
KINDS = ("gauss", "conflict")


def _ones(m: int) -> dict[str, Any]:
    return {"weights": torch.ones(m)}


@frozen
class Pair:
    """One method: its arguments here and there, given m, and its name in the peer."""

    name: str
    peer: str
    arguments: Callable[[int], dict[str, Any]] = lambda m: {}
    peer_arguments: Callable[[int], tuple[Any, ...]] = lambda m: ()
    sizes: tuple[int, ...] = SIZES
    wide: bool = False
    """Whether it is measured with a million columns too."""


@frozen
class Row:
    """One line of the result; times in microseconds."""

    method: str
    kind: str
    m: int
    n: int
    peer: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


PAIRS = (
    Pair("mean", "Mean"),
    Pair("sum", "Sum"),
    Pair("constant", "Constant", _ones, lambda m: (torch.ones(m),)),
    Pair("random", "Random"),
    Pair("upgrad", "UPGrad"),
    Pair("dualproj", "DualProj"),
    Pair("mgda", "MGDA"),
    Pair("cagrad", "CAGrad", lambda m: {"c": 0.5}, lambda m: (0.5,)),
    Pair("nash_mtl", "NashMTL", lambda m: {"n_tasks": m}, lambda m: (m,), sizes=(2, 4, 8, 32)),
    Pair("fairgrad", "FairGrad", lambda m: {"alpha": 2.0}, lambda m: (2.0,)),
    Pair("pcgrad", "PCGrad"),
    Pair("gradvac", "GradVac"),
    Pair("imtl_g", "IMTLG"),
    Pair("aligned_mtl", "AlignedMTL"),
    Pair("config", "ConFIG", wide=True),
    Pair("graddrop", "GradDrop", wide=True),
    Pair("krum", "Krum", lambda m: {"n_byzantine": 1}, lambda m: (1,), sizes=(4, 8, 32, 128)),
    Pair(
        "trimmed_mean",
        "TrimmedMean",
        lambda m: {"trim_number": 1},
        lambda m: (1,),
        sizes=(4, 8, 32, 128),
        wide=True,
    ),
)


def jacobians(kind: str, m: int, n: int, count: int) -> list[Tensor]:
    """Several, because a method with state or caches is faster on the same one again."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [family(kind, m, n, generator=seed).float() for seed in seeds]


def measure(pair: Pair, kind: str, m: int, n: int, peer_module: Any, seconds: float) -> Row:
    """Alternate calls for some seconds (at least four of each) and take the medians."""
    ours: Aggregator = jdcore.get_aggregator(pair.name, **_known(pair, m))
    peer: Aggregator = getattr(peer_module, pair.peer)(*pair.peer_arguments(m))
    matrices = jacobians(kind, m, n, 3 if n <= 10_000 else 1)
    times: dict[Aggregator, list[float]] = {peer: [], ours: []}
    for method in times:
        method(matrices[0])
    turns = [*times]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[ours]) < 4:
        for matrix in matrices:
            for method in turns:
                start = time.thread_time()
                method(matrix)
                times[method].append(time.thread_time() - start)
        turns.reverse()  # who comes first fetches a large matrix into the cache for the other
    medians = {method: 1e6 * statistics.median(spent) for method, spent in times.items()}
    return Row(method=pair.name, kind=kind, m=m, n=n, peer=medians[peer], ours=medians[ours])


def _known(pair: Pair, m: int) -> dict[str, Any]:
    """The arguments, without those that our version does not need."""
    accepted = jdcore.describe(pair.name).example(m)
    given = pair.arguments(m)
    return dict(accepted) if not given.keys() <= accepted.keys() else given


def cases(arguments: argparse.Namespace) -> list[tuple[Pair, str, int, int]]:
    """What is asked for and registered, one entry per line of the table."""
    registered = set(jdcore.list_aggregators())
    chosen = []
    for pair in PAIRS:
        if pair.name not in registered or pair.name not in (arguments.methods or registered):
            continue
        sizes = [m for m in pair.sizes if m in (arguments.m or SIZES)]
        chosen += [(pair, kind, m, arguments.n) for kind in arguments.kinds for m in sizes]
        if pair.wide:
            chosen += [(pair, "gauss", 8, 1_000_000)]
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--methods", nargs="+", choices=[pair.name for pair in PAIRS])
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seconds", type=float, default=0.5, help="per line of the table")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    try:
        import torchjd.aggregation as peer_module
    except ImportError as error:
        raise SystemExit(
            "This benchmark compares with torchjd: pip install 'torchjd[full]==0.18.0'."
        ) from error
    torch.set_num_threads(1)
    print(f"{'method':14}{'family':10}{'m':>5}{'n':>9}{'peer us':>12}{'ours us':>12}{'ratio':>9}")
    rows = []
    for pair, kind, m, n in cases(arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = measure(pair, kind, m, n, peer_module, arguments.seconds)
        rows.append(row)
        print(
            f"{row.method:14}{row.kind:10}{row.m:5}{row.n:9}{row.peer:12.0f}{row.ours:12.0f}"
            f"{'x' + format(row.ratio, '.1f'):>9}",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([{**asdict(row), "ratio": row.ratio} for row in rows], file, indent=2)


if __name__ == "__main__":
    main()
