"""The figure that the demo leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from jdcore.demo.data import OverlaidDigits
from jdcore.demo.report import TASKS
from jdcore.demo.training import Run

_EXAMPLES = 10
_STYLES = ("--", "-")  # by run
_COLOURS = ("tab:blue", "tab:orange")  # by task


def draw(path: Path, runs: Sequence[Run], digits: OverlaidDigits) -> None:
    """
    Write a PNG: some images, the loss curves of each task, the cosine between the gradients.

    :param path: File to write; an old one is replaced.
    :param runs: The runs to compare, at most two.
    :param digits: Where the images come from.
    """
    # A figure that pyplot does not know: it needs no display and leaves no global state.
    figure = Figure(figsize=(9, 8), layout="constrained", dpi=120)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 5))
    _draw_images(figure.add_subfigure(grid[0]), digits)
    losses, cosines = figure.add_subfigure(grid[1]).subplots(2, 1, sharex=True)
    window = max(1, max(len(run.steps) for run in runs) // 40)
    for run, style in zip(runs, _STYLES, strict=False):
        _draw_losses(losses, run, style, window)
    _draw_cosines(cosines, runs, window)
    figure.savefig(path, format="png")


def _draw_images(figure: SubFigure, digits: OverlaidDigits) -> None:
    figure.suptitle("Two overlaid digits: one task reads the left one, the other the right one")
    for index, axes in enumerate(figure.subplots(1, _EXAMPLES)):
        axes.imshow(digits.test_images[index].numpy(), cmap="gray_r")
        axes.set_axis_off()
        left, right = digits.test_labels[index].tolist()
        axes.set_title(f"{left}, {right}", fontsize="medium")


def _draw_losses(axes: Axes, run: Run, style: str, window: int) -> None:
    losses = np.array([step.losses for step in run.steps])
    for task, colour in enumerate(_COLOURS):
        steps, curve = _smooth(losses[:, task], window)
        axes.plot(steps, curve, style, color=colour, label=f"{run.method}, {TASKS[task]} digit")
    axes.set_ylabel(f"training loss\n(mean of {window} steps)")
    axes.legend()


def _draw_cosines(axes: Axes, runs: Sequence[Run], window: int) -> None:
    for run, style in zip(runs, _STYLES, strict=False):
        steps, curve = _smooth(np.array([step.cosine for step in run.steps]), window)
        axes.plot(steps, curve, style, color="tab:green", label=run.method)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_ylabel(f"cosine between the task gradients\n(mean of {window} steps)")
    axes.set_xlabel("step")
    axes.legend()


def _smooth(
    values: NDArray[np.float64], window: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moving average, and the step at the middle of each window."""
    window = min(window, len(values))
    curve = np.convolve(values, np.full(window, 1.0 / window), mode="valid").astype(np.float64)
    return np.arange(len(curve), dtype=np.float64) + (window + 1) / 2, curve
