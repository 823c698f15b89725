from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Wedge
from numpy.typing import NDArray
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.monitor.plots._style import COLOURS, new_axes, styled
from jdcore.protocols import Aggregator
from jdcore.validators import check_matrix, describe_tensor


def dual_cone(
    jacobian: Tensor, aggregators: Mapping[str, Aggregator], /, *, axes: Axes | None = None
) -> Axes:
    """
    Draw gradients of two parameters, their dual cone, and the updates that methods make of them.

    The dual cone holds the directions that conflict with no gradient. Updates inside of it lower
    every loss to first order.

    :param jacobian: Gradients as rows, real floating Tensor [m, 2] with m = 2 or 3.
    :param aggregators: Methods by the name that the legend shows.
    :param axes: Where to draw; new axes by default.
    :returns: The axes.
    :raises ParameterError: If the Jacobian has another shape.
    """
    check_matrix(jacobian)
    if jacobian.shape[1] != 2 or jacobian.shape[0] not in (2, 3):
        raise ParameterError("jacobian", "of shape [2, 2] or [3, 2]", describe_tensor(jacobian))
    rows = jacobian.detach().double().cpu().numpy()
    updates = {name: method(jacobian.detach()) for name, method in aggregators.items()}
    vectors = {name: update.double().cpu().numpy() for name, update in updates.items()}
    reach = 1.15 * max(np.linalg.norm(v) for v in (*rows, *vectors.values()))
    axes = new_axes((5.4, 4.4)) if axes is None else axes
    _draw_cone(axes, rows, float(reach))
    for index, row in enumerate(rows):
        _arrow(axes, row, color="0.25", width=0.006)
        # A gradient of zero has no direction in which its name could be put aside.
        offset = 0.06 * reach * row / max(np.linalg.norm(row), 1e-12)
        axes.annotate(f"$g_{index + 1}$", row + offset, ha="center", va="center")
    # Of updates in one direction, the longer ones are wide and lie below.
    order = sorted(vectors, key=lambda name: -float(np.linalg.norm(vectors[name])))
    for name, _, colour in styled(vectors):
        rank = order.index(name)
        width = 0.013 - 0.007 * rank / len(order)
        _arrow(axes, vectors[name], color=colour, width=width, zorder=3 + rank, label=name)
    _frame(axes, [np.zeros(2), *rows, *vectors.values()], float(reach))
    return axes


def _draw_cone(axes: Axes, rows: NDArray[np.float64], reach: float) -> None:
    limits = cone_limits(rows)
    if limits is None:
        return
    start, end = limits
    axes.add_patch(
        # Longer than any arrow: the frame cuts it off.
        Wedge((0, 0), 3 * reach, start, end, color=COLOURS[2], alpha=0.15, lw=0, label="dual cone")
    )


def cone_limits(rows: NDArray[np.float64]) -> tuple[float, float] | None:
    """First and last angle of the dual cone in degrees; None if it is a point."""
    angles = [math.degrees(math.atan2(y, x)) for x, y in rows if x or y]
    centre = angles[0] if angles else 0.0
    # Relative to the first gradient, so that the jump from 180 to -180 degrees lies opposite of it.
    turns = [(angle - centre + 180.0) % 360.0 - 180.0 for angle in angles]  # in [-180, 180)
    start, end = centre + max(turns, default=0.0) - 90.0, centre + min(turns, default=0.0) + 90.0
    return None if end < start or not angles else (start, end)


def _arrow(axes: Axes, vector: NDArray[np.float64], **style: Any) -> None:
    axes.quiver(0.0, 0.0, *vector, angles="xy", scale_units="xy", scale=1.0, **style)


def _frame(axes: Axes, points: list[NDArray[np.float64]], reach: float) -> None:
    corners = np.array(points)
    margin = 0.18 * reach
    axes.set_xlim(corners[:, 0].min() - margin, corners[:, 0].max() + margin)
    axes.set_ylim(corners[:, 1].min() - margin, corners[:, 1].max() + margin)
    axes.set_aspect("equal")
    axes.axhline(0.0, color="0.8", lw=0.8, zorder=0)
    axes.axvline(0.0, color="0.8", lw=0.8, zorder=0)
    axes.set_xlabel("first parameter")
    axes.set_ylabel("second parameter")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
