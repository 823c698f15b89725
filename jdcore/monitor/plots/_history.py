from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from jdcore.errors import ParameterError
from jdcore.monitor._history import History
from jdcore.monitor.plots._style import new_axes, styled

_CELLS = 200  # columns of a heat map: more than a picture of this width can show apart


def weights_over_time(history: History, /, *, axes: Axes | None = None) -> Axes:
    """
    Draw the weight of each objective over the steps, relative to the sum of all weights.

    Pale lines show every step, the others a moving average over a fiftieth of the steps.

    :param history: Steps with weights, all of the same number of objectives.
    :param axes: Where to draw; new axes by default.
    :returns: The axes.
    :raises ParameterError: If there are none.
    """
    steps = [step for step in history if step.weights]
    weights = _table([step.weights or [] for step in steps], "weights")
    sums = weights.sum(1, keepdims=True)
    axes = new_axes((6.4, 3.6)) if axes is None else axes
    # Weights that add up to zero have no shares, and are drawn as they are.
    shares = weights / np.where(sums == 0.0, 1.0, sums)
    index = np.array([step.index for step in steps])
    window = max(1, len(steps) // 50)
    # The moving average is shorter than the steps, by half a window at both ends.
    middle = index[(window - 1) // 2 : len(index) - window // 2]
    for i, (column, dashes, colour) in enumerate(styled(shares.T)):
        average = np.convolve(column, np.full(window, 1.0 / window), mode="valid")
        axes.plot(index, column, color=colour, lw=0.6, alpha=0.2)
        axes.plot(middle, average, dashes, color=colour, lw=1.4, label=f"objective {i + 1}")
    axes.set_xlabel("step")
    axes.set_ylabel("share of the weights")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return axes


def conflicts_over_time(history: History, /, *, axes: Axes | None = None) -> Axes:
    """
    Draw the cosine of each pair of gradients over the steps, as a heat map.

    :param history: Steps with cosines, all of the same number of objectives (at least two).
    :param axes: Where to draw; new axes by default.
    :returns: The axes.
    :raises ParameterError: If there are none.
    """
    steps = [step for step in history if step.cosines is not None and len(step.cosines) > 1]
    matrices = [np.asarray(step.cosines) for step in steps]
    pairs = [np.triu_indices(len(matrix), 1) for matrix in matrices]
    table = _table([m[of].tolist() for m, of in zip(matrices, pairs, strict=True)], "cosines")
    # Means of neighbouring steps, since a picture drops columns that it has no pixels for.
    groups = np.array_split(table, min(_CELLS, len(table)))
    cells = np.stack([group.mean(0) for group in groups], 1)
    names = [f"{i + 1}, {j + 1}" for i, j in zip(*pairs[0], strict=True)]
    height = 1.4 + 0.22 * len(names)
    axes = new_axes((6.4, min(8.0, height))) if axes is None else axes
    extent = (steps[0].index, steps[-1].index + 1, len(names) - 0.5, -0.5)
    image = axes.imshow(
        cells, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest", extent=extent
    )
    shown = range(0, len(names), max(1, len(names) // 24))
    axes.set_yticks(list(shown), [names[k] for k in shown])
    axes.set_xlabel("step")
    axes.set_ylabel("pair of objectives")
    axes.figure.colorbar(image, ax=axes, label="cosine of the gradients")
    return axes


def _table(rows: list[list[float]], quantity: str) -> NDArray[np.float64]:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        got = "no step" if not rows else f"steps of {sorted(lengths)}"
        raise ParameterError(
            "history",
            f"a history with {quantity} of one number of objectives",
            f"{got} with {quantity}",
            "Record with complete=True if the method needs no Gramian, and one model at a time.",
        )
    return np.array(rows, dtype=np.float64)
