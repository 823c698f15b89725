"""``jdcore doctor``: versions, plugins, and everything that they provide tried once."""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import asdict, frozen

from jdcore._commands._output import plugins_on_stderr, print_json, print_table
from jdcore._commands._records import plugin_records, solver_records
from jdcore._commands.info import solver_problem
from jdcore._discovery import AGGREGATOR, KINDS, SCALARIZER, installed_version
from jdcore._registry import registry
from jdcore._tables import Entry
from jdcore.errors import line_of

if TYPE_CHECKING:
    from torch import Tensor

Call: TypeAlias = "Callable[[], Tensor]"

_ROWS, _COLUMNS = 4, 1000
_REPETITIONS = 3


@frozen(kw_only=True)
class Trial:
    """
    One method, or one method with one solver, called on one matrix; one scalarizer, called on one
    vector of losses; or one Gramian rule, imported with its operation.

    :param kind: ``"aggregator"``, ``"scalarizer"`` or ``"rule"``.
    :param method: Name of the method, scalarizer or rule.
    :param solver: Name of the solver, or None for what takes none.
    :param milliseconds: The fastest of a few calls; None if it failed, and for rules.
    :param trouble: What went wrong, or None.
    """

    kind: str
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
        f"matrix of {_ROWS} x {_COLUMNS}, and every scalarizer on {_ROWS} losses; import every "
        "Gramian rule and its operation. "
        "Exit code 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Examine the installation.

    :returns: 1 if a plugin, or anything that one provides, is broken, else 0.
    """
    # What plugins print as they are imported is not to stand in the JSON.
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
    entries = [entry for kind in KINDS for entry in registry.entries(kind)]
    entries += [
        registry.solver(problem, name)[0]
        for problem in registry.problems()
        for name in registry.solvers(problem)
    ]
    required = sorted({distribution for entry in entries for distribution in entry.spec.requires})
    plugin_names = [plugin["distribution"] for plugin in plugins]
    for distribution in ("jdcore", "torch", "numpy", *plugin_names, *required):
        yield distribution, installed_version(distribution) or "not installed"


def _trials() -> Iterator[Trial]:
    for name in registry.names(AGGREGATOR):
        yield from _aggregator_trials(name)
    for name in registry.names(SCALARIZER):
        yield _try("scalarizer", name, None, partial(_scalarizer_call, name))
    for entry in registry.rules():
        yield _rule_trial(entry)


def _rule_trial(entry: Entry) -> Trial:
    from jdcore._commands._rules import trouble_of  # imports torch, as do all rules

    try:
        trouble = trouble_of(entry)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        trouble = line_of(error)
    return Trial(
        kind="rule",
        method=entry.qualified_name,
        solver=None,
        milliseconds=None,
        trouble=trouble,
    )


def _aggregator_trials(name: str) -> Iterator[Trial]:
    from jdcore._methods import aggregator_class  # imports torch, as do all methods

    try:
        problem = solver_problem(aggregator_class(name))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        yield Trial(
            kind="aggregator", method=name, solver=None, milliseconds=None, trouble=line_of(error)
        )
        return
    if problem is None:
        yield _try("aggregator", name, None, partial(_aggregator_call, name, {}))
        return
    for record in solver_records(problem):
        if record["installed"]:
            solver = record["name"]
            call = partial(_aggregator_call, name, {"solver": solver})
            yield _try("aggregator", name, solver, call)


def _try(kind: str, name: str, solver: str | None, prepare: Callable[[], Call]) -> Trial:
    try:
        milliseconds, trouble = _time(prepare()), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # methods of third parties may raise anything
        milliseconds, trouble = None, line_of(error)
    return Trial(kind=kind, method=name, solver=solver, milliseconds=milliseconds, trouble=trouble)


def _aggregator_call(name: str, arguments: dict[str, Any]) -> Call:
    from jdcore._methods import aggregator_class
    from jdcore.aggregation._informed import example_inputs

    spec = registry.entry(AGGREGATOR, name).spec
    m = max(_ROWS, spec.min_rows)
    matrix = _matrix(m)
    inputs = example_inputs(spec, matrix)
    aggregator = aggregator_class(name)(**{**spec.example(m), **arguments})
    return lambda: aggregator(matrix, **inputs)


def _scalarizer_call(name: str) -> Call:
    import torch

    from jdcore._methods import scalarizer_class

    losses = _matrix(_ROWS).square().mean(dim=1).requires_grad_()
    scalarizer = scalarizer_class(name)(**registry.entry(SCALARIZER, name).spec.example(_ROWS))

    def call() -> Tensor:
        # With its gradient, as training asks for it.
        loss = scalarizer(losses)
        return torch.cat([loss[None], *torch.autograd.grad(loss, [losses])])

    return call


def _matrix(m: int) -> Tensor:
    import torch

    # Always the same: what is slow or broken is so at the next run as well.
    return torch.randn(m, _COLUMNS, generator=torch.Generator().manual_seed(0))


def _time(call: Call) -> float:
    """
    Milliseconds of the fastest of a few calls.

    :raises TypeError: If a result is no Tensor.
    :raises ArithmeticError: If a result is not finite.
    """
    from torch import Tensor

    from jdcore.validators import describe_tensor

    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on numbers this tame, a warning is trouble too
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
    if not isinstance(result, Tensor):
        raise TypeError(f"the result is {describe_tensor(result)}, no Tensor")
    if not bool(result.isfinite().all()):
        raise ArithmeticError("the result is not finite")
    return 1e3 * min(seconds)


def _label(trial: Trial) -> str:
    if trial.solver is not None:
        return f"{trial.method} with {trial.solver}"
    return trial.method if trial.kind == "aggregator" else f"{trial.kind} {trial.method}"


def _print(versions: dict[str, str], trials: list[Trial], troubles: list[str]) -> None:
    print_table(("distribution", "version"), list(versions.items()))
    if trials:
        print()
        rows = [_row(trial) for trial in trials]
        print_table(("name", "kind", "solver", "ms", "result"), rows)
    print()
    for trouble in troubles:
        print(f"Broken: {trouble}")
    if not troubles:
        print("Nothing is broken.")


def _row(trial: Trial) -> tuple[str, ...]:
    milliseconds = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
    result = "failed" if trial.trouble else "ok"
    return trial.method, trial.kind, trial.solver or "", milliseconds, result
