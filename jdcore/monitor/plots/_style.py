from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle, product
from os import PathLike
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

T = TypeVar("T")

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
"""The colours of `Okabe and Ito <https://jfly.uni-koeln.de/color/>`_ without their yellow, which
people tell apart whatever colours they can see."""

# All colours before the next kind of line: a few curves differ in colour alone.
_STYLES = tuple(product(("-", "--", ":"), COLOURS))


def styled(curves: Iterable[T]) -> Iterator[tuple[T, str, str]]:
    """Curves, each with a line style and a colour. There are 21: the next one is as the first."""
    for curve, (dashes, colour) in zip(curves, cycle(_STYLES), strict=False):
        yield curve, dashes, colour


def new_axes(figsize: tuple[float, float], **options: Any) -> Axes:
    """Axes in a figure unknown to pyplot: it needs no display and leaves no global state."""
    figure = Figure(figsize=figsize, layout="constrained", dpi=150)
    axes: Axes = figure.add_subplot(**options)
    return axes


def save(axes: Axes, path: str | PathLike[str], **options: Any) -> None:
    """
    Write the figure of some axes to a file.

    :param path: File to write; its ending tells the format. An old one is replaced.
    :param options: As for ``matplotlib.figure.Figure.savefig``.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(path, **{"bbox_inches": "tight", **options})
