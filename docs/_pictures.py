"""The pictures of the documentation, drawn by the library itself."""

from __future__ import annotations

from pathlib import Path

import torch

from jdcore import monitor
from jdcore.aggregation import UPGrad
from jdcore.autojac import backward, jac_to_grad
from jdcore.demo.data import overlaid_digits
from jdcore.demo.model import TwoDigitReader
from jdcore.monitor import plots
from jdcore.registry import get_aggregator

_STEPS = 300
_SHOWN = ("Mean", "UPGrad", "MGDA", "NashMTL")


def draw(folder: Path) -> None:
    """Write ``cone.png``, ``conflicts.png`` and ``weights.png``."""
    jacobian = torch.tensor([[-1.0, 1.2], [2.2, 0.4]])
    methods = {name: get_aggregator(name) for name in _SHOWN}
    plots.save(plots.dual_cone(jacobian, methods), folder / "cone.png")
    history = _history()
    plots.save(plots.conflicts_over_time(history), folder / "conflicts.png")
    plots.save(plots.weights_over_time(history), folder / "weights.png")


def _history() -> monitor.History:
    """A training on two overlaid digits: two losses of the left one, two of the right one."""
    torch.manual_seed(0)
    digits, model, aggregator = overlaid_digits(0), TwoDigitReader(), UPGrad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.record() as history:
        for step in range(_STEPS):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(digits.train_images)
            optimizer.zero_grad()
            scores = model(digits.train_images[batch]).movedim(1, 0).flatten(0, 1)
            labels = digits.train_labels[batch].T.flatten()
            losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
            backward(losses.view(4, 32).mean(1))
            jac_to_grad(model.parameters(), aggregator)
            optimizer.step()
    return history
