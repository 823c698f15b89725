"""``jdcore bench``: run published experiments. All arguments are checked before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jdcore.demo.command import require_extra, whole, writable_folder
from jdcore.errors import ParameterError
from jdcore.registry import describe

EXPERIMENTS = ("toy", "quadratics", "burgers", "overlaid", "single", "qm9")


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the commands of the program."""
    parser = commands.add_parser(
        "bench",
        help="run published experiments, with seeds, spread and a tuned mean beside the methods",
        description="Run published experiments that fit on two cores: "
        + ", ".join(EXPERIMENTS)
        + ". Prints tables, writes a figure and a JSON file for each.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="experiments; all by default")
    parser.add_argument("--methods", metavar="NAME", nargs="+", help="methods to compare")
    parser.add_argument("--seeds", metavar="N", type=whole(1), default=3, help="repetitions")
    parser.add_argument(
        "--quick", action="store_true", help="small versions, to see that everything works"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("jdcore-bench"), help="folder of results"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Check the arguments, run the experiments, and report.

    :raises JDCoreError: If an argument cannot be used or the extra is not installed.
    """
    for name in arguments.names:
        if name not in EXPERIMENTS:
            raise ParameterError("NAME", f"one of {', '.join(EXPERIMENTS)}", repr(name))
    for method in arguments.methods or ():
        describe(method)  # raises if it is not installed
    require_extra()
    folder = writable_folder(arguments.out)

    from jdcore.bench.outcome import Settings
    from jdcore.bench.report import report

    methods = None if arguments.methods is None else tuple(arguments.methods)
    settings = Settings(methods=methods, seeds=arguments.seeds, quick=arguments.quick)
    report(arguments.names or EXPERIMENTS, settings, folder)
