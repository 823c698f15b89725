"""What an experiment is given, and what it brings back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any

from attrs import field, frozen
from matplotlib.axes import Axes
from torch import Tensor

from jdcore.aggregation import taken_by
from jdcore.demo.command import make_aggregator
from jdcore.errors import JDCoreError
from jdcore.protocols import Aggregator
from jdcore.registry import describe, list_aggregators

Make = Callable[[str], Any]
"""Makes what an experiment uses of a method, by its name, or raises a JDCoreError."""


@frozen(kw_only=True)
class Settings:
    """
    How an experiment is run.

    :param methods: Names of the methods to compare, or None for those of the experiment.
    :param seeds: Number of repetitions of what is random.
    :param quick: Whether to run a small version, which shows that everything works and no more.
    """

    methods: tuple[str, ...] | None = None
    seeds: int = 3
    quick: bool = False

    def names(self, make: Make, default: Sequence[str] | None = None) -> list[str]:
        """
        The methods: those asked for, those of the experiment, or all, as far as they can be made.

        :param make: Makes a method for the objectives of the experiment, or raises.
        """
        installed = list_aggregators()
        if self.methods is not None:
            # In the spelling of the registry, which tables and files are keyed by.
            wanted = [describe(name).name for name in self.methods]
        else:
            # What an experiment names need not be installed: its other methods are run.
            wanted = [name for name in default or installed if name in installed]
        return [name for name in wanted if refusal(make, name) is None]

    def runs(self, make: Make, default: Sequence[str]) -> list[tuple[str, int]]:
        """Method and seed of each training; one seed in the small version."""
        seeds = range(1 if self.quick else self.seeds)
        return list(product(self.names(make, default), seeds))


def refusal(make: Make, name: str) -> JDCoreError | None:
    """Why a method cannot be made; None if it can."""
    try:
        make(name)
    except JDCoreError as error:
        return error
    return None


def planar(name: str) -> Aggregator:
    """A method for two losses of two parameters, which are the same in every batch."""
    return make_aggregator(name, columns=2, two_batches=True)


def follow(aggregator: Aggregator, jacobian: Tensor, losses: Tensor) -> Tensor:
    """The update of such a method, which is told all that it may ask for."""
    return aggregator(jacobian, **taken_by(aggregator, losses=losses, second=jacobian))


@frozen(kw_only=True)
class Table:
    """
    A table of results.

    :param note: What a reader has to know, the published figures included; may be empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@frozen(kw_only=True, eq=False)
class Outcome:
    """
    What an experiment brings back.

    :param tables: What is printed.
    :param data: Everything behind it, JSON-able.
    :param picture: Draws the figure of the experiment.
    """

    tables: tuple[Table, ...]
    data: dict[str, Any]
    picture: Callable[[], Axes] | None = field(default=None)


@frozen(kw_only=True, eq=False)
class Experiment:
    """
    An experiment that can be asked for by name.

    :param make: Makes a method for its objectives, or raises.
    :param work: How many times ``advance`` will be called.
    :param run: Runs it; calls ``advance`` as it gets along.
    """

    name: str
    summary: str
    make: Make
    work: Callable[[Settings], int]
    run: Callable[[Settings, Callable[[], None]], Outcome]


def without(refused: Mapping[str, JDCoreError]) -> str:
    """A sentence for each method that refused a problem on the way, for the note of a table."""
    return "".join(f" Without {describe(name).class_name}: {e}" for name, e in refused.items())


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation as text; of one value, the value alone."""
    return _mean_and(stdev, values, digits)


def paired(values: Sequence[float], digits: int = 3) -> str:
    """Mean of differences and the standard error of this mean; of one value, the value alone."""
    return _mean_and(lambda found: stdev(found) / math.sqrt(len(found)), values, digits)


def _mean_and(
    deviation: Callable[[Sequence[float]], float], values: Sequence[float], digits: int
) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged"
    text = f"{mean(finite):.{digits}f}"
    return text if len(finite) < 2 else f"{text} ± {deviation(finite):.{digits}f}"
