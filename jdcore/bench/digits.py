"""
Handwritten digits: two overlaid ones (a loss per task), and single ones (a loss per sample).

Every method, the mean included, gets the learning rate of Adam that does best for it, in training
loss, on seeds that are used for nothing else; the comparison is on fresh seeds, and paired: the
same seed gives the same data, first weights and batches to all methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from attrs import frozen
from matplotlib.axes import Axes
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jdcore.aggregation._weigh import as_weighting
from jdcore.autogram import Engine
from jdcore.autojac import jac_to_grad, mtl_backward
from jdcore.bench.outcome import Experiment, Outcome, Settings, Table, paired, spread
from jdcore.demo.command import make_aggregator
from jdcore.demo.data import overlaid_digits
from jdcore.demo.model import TwoDigitReader
from jdcore.monitor.plots._style import new_axes, styled
from jdcore.protocols import Weighting
from jdcore.registry import describe

_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
_TUNING_SEED = 10_000  # and following: fresh seeds of the comparison are small numbers
_TUNING_SEEDS = 2
_NOISE = 0.2
_BATCH = 32
_BASELINE = "mean"
_DEFAULT = ("mean", "upgrad", "mgda")


@frozen(eq=False)
class Result:
    """Loss on the training data, and the share of the test data that is read correctly."""

    loss: float
    accuracy: float


Trainer = Callable[[str, int, float, int], Result]
"""Trains a method with a seed, a learning rate and a number of epochs."""


def train_overlaid(name: str, seed: int, rate: float, epochs: int) -> Result:
    """Two overlaid digits, one loss for each."""
    # Before the seed is set, which the first weights and the method share from there on.
    data = overlaid_digits(seed)
    torch.manual_seed(seed)
    model, aggregator = TwoDigitReader(), make_aggregator(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    shared = list(model.trunk.parameters())
    for batch in _batches(len(data.train_images), epochs, seed, size=64):
        optimizer.zero_grad()
        features = model.trunk(data.train_images[batch])
        labels = data.train_labels[batch]
        losses = [cross_entropy(h(features), labels[:, i]) for i, h in enumerate(model.heads)]
        mtl_backward(losses, features)
        jac_to_grad(shared, aggregator, losses=losses)
        optimizer.step()
    with torch.no_grad():
        scores, labels = model(data.train_images), data.train_labels
        loss = cross_entropy(scores.flatten(0, 1), labels.flatten()).item()
        read = model(data.test_images).argmax(2) == data.test_labels
    return Result(loss, read.double().mean().item())


def train_single(noise: float, name: str, seed: int, rate: float, epochs: int) -> Result:
    """
    Single digits, one loss per sample of a batch.

    :param noise: Share of the labels of the training data that are drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels, test_images, test_labels = _single_digits(noise, generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    engine, weighting = Engine(model, batch_dim=0), _weighting(name)
    for batch in _batches(len(images), epochs, seed, size=_BATCH):
        optimizer.zero_grad()
        losses = cross_entropy(model(images[batch]), labels[batch], reduction="none")
        engine.backward(losses, weighting)
        optimizer.step()
    with torch.no_grad():
        loss = cross_entropy(model(images), labels).item()
        read = model(test_images).argmax(1) == test_labels
    return Result(loss, read.double().mean().item())


def _weighting(name: str) -> Weighting:
    weighting: Weighting = as_weighting(make_aggregator(name, tasks=_BATCH), "--methods")
    return weighting


def _single_digits(
    noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[500:], order[:500]
    given = labels[train].clone()
    wrong = torch.rand(len(given), generator=generator) < noise
    # Of all labels, so that a tenth of these are right all the same.
    given[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return images[train], given, images[test], labels[test]


def _batches(count: int, epochs: int, seed: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)  # not shared with stochastic methods
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].view(-1, size)


@frozen(kw_only=True)
class Plan:
    """How much is trained: learning rates, seeds, and epochs."""

    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int

    @staticmethod
    def of(settings: Settings, epochs: int) -> Plan:
        """The plan for some settings."""
        if settings.quick:
            return Plan(rates=(1e-2,), tuning_seeds=(), seeds=(0,), epochs=1)
        tuning = tuple(range(_TUNING_SEED, _TUNING_SEED + _TUNING_SEEDS))
        seeds = tuple(range(settings.seeds))
        return Plan(rates=_RATES, tuning_seeds=tuning, seeds=seeds, epochs=epochs)

    @property
    def trainings(self) -> int:
        """Number of trainings of one method."""
        # A single rate needs no tuning, as in the quick version.
        tuned = len(self.rates) * len(self.tuning_seeds) if len(self.rates) > 1 else 0
        return tuned + len(self.seeds)


@frozen(eq=False)
class Comparison:
    """The learning rate of a method, and its results by seed."""

    rate: float
    results: list[Result]


def compare(
    trainer: Trainer, names: list[str], plan: Plan, advance: Callable[[], None]
) -> dict[str, Comparison]:
    """Tune each method, then train it on the fresh seeds."""

    def results(name: str, rate: float, seeds: tuple[int, ...]) -> list[Result]:
        found = []
        for seed in seeds:
            found.append(trainer(name, seed, rate, plan.epochs))
            advance()
        return found

    def tuned(name: str) -> float:
        if len(plan.rates) == 1:
            return plan.rates[0]
        # By training loss: to tune on the test data would flatter the method with the most luck.
        losses = {}
        for rate in plan.rates:
            total = sum(result.loss for result in results(name, rate, plan.tuning_seeds))
            # A rate that diverges must not win, as NaN would in `min` if it came first.
            losses[rate] = total if math.isfinite(total) else math.inf
        return min(losses, key=lambda rate: losses[rate])

    found = {}
    for name in names:
        rate = tuned(name)
        found[name] = Comparison(rate, results(name, rate, plan.seeds))
    return found


def _table(title: str, found: dict[str, Comparison]) -> Table:
    baseline = found.get(_BASELINE)
    rows = []
    for name, comparison in found.items():
        losses = [r.loss for r in comparison.results]
        accuracies = [100.0 * r.accuracy for r in comparison.results]
        if baseline is None or name == _BASELINE:
            differences = ("", "")
        else:
            pairs = list(zip(comparison.results, baseline.results, strict=True))
            differences = (
                paired([a.loss - b.loss for a, b in pairs]),
                paired([100.0 * (a.accuracy - b.accuracy) for a, b in pairs], 1),
            )
        rate = f"{comparison.rate:g}"
        cells = (spread(losses), spread(accuracies, 1))
        rows.append((describe(name).class_name, rate, *cells, *differences))
    return Table(
        title=title,
        columns=(
            "method",
            "rate",
            "training loss",
            "test accuracy, %",
            "loss less the mean's",
            "accuracy less the mean's, %",
        ),
        rows=tuple(rows),
        note="± is the standard deviation over the seeds; for the differences, which are paired by "
        "seed, the standard error of their mean: one of less than two of it says nothing.",
    )


def _data(found: dict[str, Comparison]) -> dict[str, object]:
    return {
        name: {
            "rate": comparison.rate,
            "loss": [result.loss for result in comparison.results],
            "accuracy": [result.accuracy for result in comparison.results],
        }
        for name, comparison in found.items()
    }


def _picture(found: dict[str, dict[str, Comparison]]) -> Axes:
    axes = new_axes((6.4, 3.6))
    methods = list(dict.fromkeys(name for runs in found.values() for name in runs))
    for place, (method, _, colour) in enumerate(styled(methods)):
        for row, runs in enumerate(found.values()):
            if method in runs:
                shares = [100.0 * result.accuracy for result in runs[method].results]
                height = row + 0.18 * (place - (len(methods) - 1) / 2)
                label = describe(method).class_name if row == 0 else None
                axes.plot(shares, [height] * len(shares), "o", color=colour, ms=5, label=label)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (one point per seed)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return axes


_OVERLAID_EPOCHS, _SINGLE_EPOCHS = 4, 40


def _work_overlaid(settings: Settings) -> int:
    return Plan.of(settings, _OVERLAID_EPOCHS).trainings * len(
        settings.names(make_aggregator, _DEFAULT)
    )


def _run_overlaid(settings: Settings, advance: Callable[[], None]) -> Outcome:
    plan = Plan.of(settings, _OVERLAID_EPOCHS)
    found = compare(train_overlaid, settings.names(make_aggregator, _DEFAULT), plan, advance)
    return Outcome(
        tables=(_table("Two overlaid digits, a loss for each", found),),
        data=_data(found),
        picture=lambda: _picture({"overlaid": found}),
    )


def _work_single(settings: Settings) -> int:
    return (
        2 * Plan.of(settings, _SINGLE_EPOCHS).trainings * len(settings.names(_weighting, _DEFAULT))
    )


def _run_single(settings: Settings, advance: Callable[[], None]) -> Outcome:
    plan = Plan.of(settings, _SINGLE_EPOCHS)
    names = settings.names(_weighting, _DEFAULT)
    shares = {"true labels": 0.0, f"{_NOISE:.0%} of the labels drawn anew": _NOISE}
    found = {
        title: compare(partial(train_single, noise), names, plan, advance)
        for title, noise in shares.items()
    }
    return Outcome(
        tables=tuple(
            _table(f"Single digits, a loss per sample, {title}", runs)
            for title, runs in found.items()
        ),
        data={title: _data(runs) for title, runs in found.items()},
        picture=lambda: _picture(found),
    )


OVERLAID = Experiment(
    name="overlaid",
    summary="two overlaid digits, a loss per task, against a tuned mean",
    make=make_aggregator,
    work=_work_overlaid,
    run=_run_overlaid,
)

SINGLE = Experiment(
    name="single",
    summary="single digits, a loss per sample, with true and with noisy labels",
    make=_weighting,
    work=_work_single,
    run=_run_single,
)
