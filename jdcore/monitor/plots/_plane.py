from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from jdcore.monitor.plots._style import new_axes, styled

Curves = Mapping[str, Sequence[ArrayLike]]


def trajectories(
    paths: Curves,
    /,
    *,
    contours: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
    | None = None,
    front: ArrayLike | None = None,
    axes: Axes | None = None,
) -> Axes:
    """
    Draw the paths that methods take through the plane of two parameters.

    :param paths: For the name of each method, one path [steps, 2] per start.
    :param contours: A function of the two parameters whose level lines lie behind the paths, such
        as the mean of the losses; it is called with two arrays [a, b].
    :param front: Points [k, 2] of the Pareto set.
    :param axes: Where to draw; new axes by default.
    :returns: The axes.
    """
    axes = _draw(paths, front, "Pareto set", axes)
    if contours is not None:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
        axes.contour(x, y, contours(x, y), levels=20, colors="0.8", linewidths=0.7, zorder=0)
        # Level lines must not change the limits, which are those of the paths.
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
    axes.set_xlabel("first parameter")
    axes.set_ylabel("second parameter")
    return axes


def pareto_front(
    points: Curves, /, *, front: ArrayLike | None = None, axes: Axes | None = None
) -> Axes:
    """
    Draw losses that methods, or one method with a sweep of preferences, arrive at.

    :param points: For the name of each method, one path or set of points [k, 2] of two losses
        per start.
    :param front: Points [k, 2] of the Pareto front, in the space of the losses.
    :param axes: Where to draw; new axes by default.
    :returns: The axes.
    """
    axes = _draw(points, front, "Pareto front", axes)
    axes.set_xlabel("first loss")
    axes.set_ylabel("second loss")
    return axes


def _draw(curves: Curves, front: ArrayLike | None, label: str, axes: Axes | None) -> Axes:
    axes = new_axes((6.4, 4.6)) if axes is None else axes
    for (name, paths), dashes, colour in styled(curves.items()):
        for index, path in enumerate(map(np.asarray, paths)):
            # One entry of the legend for all starts of a method.
            shown = name if index == 0 else None
            axes.plot(path[:, 0], path[:, 1], dashes, color=colour, lw=1.2, label=shown)
            # Where paths begin is hollow, where they end is filled.
            axes.plot(*path[0], "o", color=colour, ms=4, mfc="white")
            axes.plot(*path[-1], "o", color=colour, ms=5)
    if front is not None:
        line = np.asarray(front)
        axes.plot(line[:, 0], line[:, 1], color="0.55", lw=5, alpha=0.5, zorder=1, label=label)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return axes
