"""What the pictures show, read off the artists; and that they are drawn at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jdcore import monitor
from jdcore.aggregation import MGDA, Mean, UPGrad, UPGradWeighting
from jdcore.errors import ParameterError

pytest.importorskip("matplotlib")

from jdcore.monitor import plots
from jdcore.monitor.plots._cone import cone_limits

JACOBIAN = torch.tensor([[-4.0, 1.0], [6.0, 1.0]])


@pytest.mark.parametrize(
    ("rows", "limits"),
    [
        ([[1, 0], [0, 1]], (0.0, 90.0)),
        ([[1, 0], [1, 1], [0, 1]], (0.0, 90.0)),
        ([[1, 0], [1, 0]], (-90.0, 90.0)),
        ([[-1, 1], [-1, -1]], (135.0, 225.0)),
        ([[0, 0], [0, 2]], (0.0, 180.0)),
        ([[1, 0], [-1, 1e-9], [-1, -1e-9]], None),
        ([[0, 0], [0, 0]], None),
    ],
)
def test_the_limits_of_the_dual_cone(
    rows: list[list[float]], limits: tuple[float, float] | None
) -> None:
    found = cone_limits(np.array(rows, dtype=np.float64))

    assert (found is None) == (limits is None)
    if found is not None and limits is not None:
        turned = [(a - b) % 360 for a, b in zip(found, limits, strict=True)]
        assert [min(a, 360 - a) for a in turned] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_cone_shows_gradients_and_updates(tmp_path: Path) -> None:
    axes = plots.dual_cone(JACOBIAN, {"mean": Mean(), "UPGrad": UPGrad(), "MGDA": MGDA()})

    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["dual cone", "mean", "UPGrad", "MGDA"]
    assert [text.get_text() for text in axes.texts] == ["$g_1$", "$g_2$"]
    plots.save(axes, tmp_path / "cone.png")
    assert (tmp_path / "cone.png").read_bytes().startswith(b"\x89PNG")


def test_the_cone_takes_two_or_three_gradients_of_two_parameters() -> None:
    with pytest.raises(ParameterError, match="`jacobian` must be of shape"):
        plots.dual_cone(torch.eye(3), {})


def history(m: int, steps: int) -> monitor.History:
    generator = torch.Generator().manual_seed(0)
    weighting = UPGradWeighting()
    with monitor.record() as recorded:
        for _ in range(steps):
            rows = torch.randn(m, 5, generator=generator)
            weighting(rows @ rows.T)
    return recorded


def test_weights_are_drawn_as_shares_of_each_objective() -> None:
    recorded = history(3, 120)

    axes = plots.weights_over_time(recorded)

    raw = axes.get_lines()[::2]
    assert len(raw) == 3
    total = np.sum([line.get_ydata() for line in raw], axis=0)
    np.testing.assert_allclose(total, 1.0)


def test_no_curve_is_left_out_however_many_there_are() -> None:
    many = 25
    with monitor.record() as history:
        Mean()(torch.ones(many, 2))
    weights = plots.weights_over_time(history)
    paths = plots.trajectories({str(i): [np.zeros((2, 2))] for i in range(many)})
    cone = plots.dual_cone(JACOBIAN, {str(i): Mean() for i in range(many)})

    for axes, others in ((weights, 0), (paths, 0), (cone, 1)):
        assert len(axes.get_legend().get_texts()) == many + others


def test_conflicts_are_drawn_for_every_pair() -> None:
    recorded = history(4, 500)

    axes = plots.conflicts_over_time(recorded)

    [image] = axes.images
    assert image.get_array().shape == (6, 200)
    assert image.get_clim() == (-1, 1)
    assert axes.get_yticklabels()[0].get_text() == "1, 2"


@pytest.mark.parametrize("draw", [plots.weights_over_time, plots.conflicts_over_time])
def test_a_history_without_what_is_drawn_is_refused(draw: object) -> None:
    with pytest.raises(ParameterError, match="`history` must be a history with"):
        draw(monitor.History())  # type: ignore[operator]


@pytest.mark.parametrize("draw", [plots.weights_over_time, plots.conflicts_over_time])
def test_a_history_of_several_numbers_of_objectives_is_refused(draw: object) -> None:
    mixed = history(3, 2)
    mixed.steps += history(4, 1).steps
    with pytest.raises(ParameterError, match=r"of one number of objectives, got steps of \["):
        draw(mixed)  # type: ignore[operator]


def test_paths_keep_their_ends_and_names() -> None:
    paths = {"one": [[[0, 0], [1, 1]], [[2, 0], [1, 1]]], "other": [[[0, 1], [1, 0]]]}

    axes = plots.trajectories(
        paths, contours=lambda x, y: x**2 + y**2, front=[[0.0, 0.0], [1.0, 1.0]]
    )

    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["one", "other", "Pareto set"]
    curves = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) > 1]
    assert curves[0] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_front_is_drawn_in_the_space_of_the_losses() -> None:
    axes = plots.pareto_front({"sweep": [[[0.0, 1.0], [1.0, 0.0]]]})

    assert (axes.get_xlabel(), axes.get_ylabel()) == ("first loss", "second loss")
