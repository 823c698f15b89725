"""Arguments of ``jdcore demo``. Everything that can be wrong with them is found before training."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdcore.errors import MissingPackageError, ParameterError
from jdcore.registry import describe, get_aggregator

if TYPE_CHECKING:
    from jdcore.protocols import Aggregator

TASKS = 2
_COLUMNS = 8

_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def add_parser(commands: Any) -> None:
    """Add ``demo`` to the commands of the program."""
    parser = commands.add_parser(
        "demo",
        help="train on two overlaid digits, with the mean and with a method of your choice",
        description="Train a network that reads two overlaid handwritten digits, once with the "
        "mean of both gradients and once with an aggregation method, then compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--aggregator", metavar="NAME", default="upgrad", help="method to compare")
    parser.add_argument("--epochs", metavar="N", type=whole(1), default=6, help="passes over data")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("jdcore-demo"), help="folder of the figure"
    )
    parser.add_argument(
        "--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="seed of everything"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Check the arguments, train, and report.

    :raises JDCoreError: If an argument cannot be used or the extra is not installed.
    """
    name = arguments.aggregator
    spec = describe(name)
    if spec.min_rows > TASKS:
        raise _refused(name, f"it needs at least {spec.min_rows}")
    require_extra()
    methods = [
        (describe("mean").class_name, get_aggregator("mean")),
        (spec.class_name, make_aggregator(name)),
    ]
    folder = writable_folder(arguments.out)

    from jdcore.demo.experiment import compare

    compare(methods, folder=folder, epochs=arguments.epochs, seed=arguments.seed)


def make_aggregator(
    name: str, *, tasks: int = TASKS, columns: int = _COLUMNS, two_batches: bool = False
) -> Aggregator:
    """
    An unused aggregator, with arguments from its spec where it has no defaults.

    :param tasks: Number of objectives it has to work for.
    :param columns: Number of parameters it has to work for.
    :param two_batches: Whether it will be given the Jacobian of a second batch, too.
    :raises JDCoreError: If the method is unknown, or does not work for that.
    """
    import torch  # on demand, as `jdcore --help` has no use for it

    from jdcore._methods import aggregator_class
    from jdcore.aggregation import taken_by

    cls, example = aggregator_class(name), describe(name).example(tasks)
    parameters = signature(cls).parameters.values()
    # Defaults where there are some: what a user gets who types the name alone.
    required = {p.name for p in parameters if p.default is Parameter.empty}
    arguments = {k: v for k, v in example.items() if k in required}
    rows = torch.eye(tasks, columns)
    known = {"losses": torch.ones(tasks), "second": rows if two_batches else None}
    try:
        # Some methods can tell only at a call that they need more rows.
        with torch.random.fork_rng(devices=[]):
            trial = get_aggregator(name, **arguments)
            trial(rows, **taken_by(trial, **known))
    except Exception as error:
        raise _refused(name, str(error).rstrip("."), tasks) from error
    aggregator: Aggregator = get_aggregator(name, **arguments)
    return aggregator


def _refused(name: str, reason: str, tasks: int = TASKS) -> ParameterError:
    return ParameterError("--aggregator", f"a method for {tasks} objectives", f"{name!r}: {reason}")


def require_extra() -> None:
    """Check that what the demo and the experiments import is installed."""
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(missing, "pip install 'jdcore[demo]'")


def writable_folder(path: Path) -> Path:
    """The folder, made if it was not there; refused if nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ParameterError(
            "--out", "a folder to write to", f"{str(path)!r} ({reason})"
        ) from error


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A type of arguments: whole numbers in a range."""
    expected = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number {expected}, got {text!r}")
        return value

    return convert
