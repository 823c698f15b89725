"""``jdcore doctor``: versions, plugins, and every method and solver tried once."""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Iterator
from typing import Any

from attrs import asdict, frozen

from jdcore._commands._output import plugins_on_stderr, print_json, print_table
from jdcore._commands._records import (
    installed_version,
    method_record,
    plugin_records,
    solver_records,
)
from jdcore._commands.info import solver_problem
from jdcore._registry import registry
from jdcore.errors import JDCoreError

_ROWS, _COLUMNS = 4, 1000
_REPETITIONS = 3


@frozen(kw_only=True)
class Trial:
    """
    One method, or one method with one solver, called on one matrix.

    :param method: Name of the method.
    :param solver: Name of the solver, or None for a method that takes none.
    :param milliseconds: The fastest of a few calls; None if it failed.
    :param trouble: What went wrong, or None.
    """

    method: str
    solver: str | None
    milliseconds: float | None
    trouble: str | None


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the commands of the program."""
    parser = commands.add_parser(
        "doctor",
        help="check the installation, and time every method",
        description="Show versions and plugins, and try every method with every solver on one "
        f"matrix of {_ROWS} x {_COLUMNS}. Exit code 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Examine the installation.

    :returns: 1 if a plugin or a method is broken, else 0.
    """
    with plugins_on_stderr():
        plugins = list(plugin_records())
        versions = dict(_versions(plugins))
        trials = list(_trials())
    troubles = [f"{p['distribution']}: {p['reason']}" for p in plugins if p["status"] == "failed"]
    troubles += [f"{_label(trial)}: {trial.trouble}" for trial in trials if trial.trouble]
    if arguments.json:
        print_json(
            {
                "versions": versions,
                "plugins": plugins,
                "trials": [asdict(trial) for trial in trials],
                "troubles": troubles,
            }
        )
    else:
        _print(versions, trials, troubles)
    return 1 if troubles else 0


def _versions(plugins: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    records = [method_record(name) for name in registry.aggregators()]
    records += [solver for problem in registry.problems() for solver in solver_records(problem)]
    required = sorted({distribution for record in records for distribution in record["requires"]})
    plugin_names = [plugin["distribution"] for plugin in plugins]
    for distribution in ("jdcore", "torch", "numpy", *plugin_names, *required):
        yield distribution, installed_version(distribution) or "not installed"


def _trials() -> Iterator[Trial]:
    from jdcore._methods import aggregator_class  # imports torch, as do all methods

    for name in registry.aggregators():
        try:
            problem = solver_problem(aggregator_class(name))
        except JDCoreError as error:
            yield Trial(method=name, solver=None, milliseconds=None, trouble=_one_line(error))
            continue
        if problem is None:
            yield _try(name, None)
        for solver in [] if problem is None else solver_records(problem):
            if solver["installed"]:
                yield _try(name, solver["name"])


def _try(name: str, solver: str | None) -> Trial:
    try:
        milliseconds, trouble = _time(name, {} if solver is None else {"solver": solver}), None
    except Exception as error:  # a method of anybody may raise anything
        milliseconds, trouble = None, _one_line(error)
    return Trial(method=name, solver=solver, milliseconds=milliseconds, trouble=trouble)


def _time(name: str, arguments: dict[str, Any]) -> float:
    """
    Milliseconds of one call.

    :raises ArithmeticError: If the result is not finite.
    """
    import torch

    from jdcore._methods import aggregator_class
    from jdcore.aggregation._informed import example_inputs

    spec = registry.aggregator(name).spec
    m = max(_ROWS, spec.min_rows)
    matrix = torch.randn(m, _COLUMNS, generator=torch.Generator().manual_seed(0))
    inputs = example_inputs(spec, matrix)
    aggregator = aggregator_class(name)(**{**spec.example(m), **arguments})
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on a matrix this tame, a warning is trouble too
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            vector = aggregator(matrix, **inputs)
            seconds.append(time.perf_counter() - start)
    if not bool(torch.isfinite(vector).all()):
        raise ArithmeticError("the update is not finite")
    return 1e3 * min(seconds)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _label(trial: Trial) -> str:
    return trial.method if trial.solver is None else f"{trial.method} with {trial.solver}"


def _print(versions: dict[str, str], trials: list[Trial], troubles: list[str]) -> None:
    print_table(("distribution", "version"), list(versions.items()))
    if trials:
        print()
        print_table(("method", "solver", "ms", "result"), [_row(trial) for trial in trials])
    print()
    for trouble in troubles:
        print(f"Broken: {trouble}")
    if not troubles:
        print("Nothing is broken.")


def _row(trial: Trial) -> tuple[str, ...]:
    milliseconds = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
    return trial.method, trial.solver or "", milliseconds, "failed" if trial.trouble else "ok"
