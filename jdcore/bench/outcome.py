"""What an experiment is given, and what it brings back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from attrs import field, frozen
from matplotlib.axes import Axes

from jdcore.registry import describe, list_aggregators

_ROWS = 2  # objectives of the smallest experiments


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

    def names(self, default: Sequence[str] | None = None) -> list[str]:
        """The methods: those asked for, those of the experiment, or all that work for two rows."""
        if self.methods is not None:
            return [describe(name).name for name in self.methods]
        installed = list_aggregators()
        wanted = installed if default is None else [n for n in default if n in installed]
        return [name for name in wanted if describe(name).min_rows <= _ROWS]


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

    :param work: How many times ``advance`` will be called.
    :param run: Runs it; calls ``advance`` as it gets along.
    """

    name: str
    summary: str
    work: Callable[[Settings], int]
    run: Callable[[Settings, Callable[[], None]], Outcome]


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
