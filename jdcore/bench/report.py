"""Runs experiments with a progress bar, prints their tables, writes figures and JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import asdict
from rich.console import Console
from rich.text import Text

from jdcore.bench.burgers import BURGERS
from jdcore.bench.digits import OVERLAID, SINGLE
from jdcore.bench.outcome import Experiment, Outcome, Settings, Table, refusal
from jdcore.bench.qm9 import QM9, installed
from jdcore.bench.quadratics import QUADRATICS
from jdcore.bench.toy import TOY
from jdcore.demo.report import new_table, progress_bar
from jdcore.demo.training import one_thread
from jdcore.errors import ParameterError
from jdcore.monitor.plots import save

EXPERIMENTS = {e.name: e for e in (TOY, QUADRATICS, BURGERS, OVERLAID, SINGLE, QM9)}


def report(names: Sequence[str], settings: Settings, folder: Path) -> None:
    """
    Run experiments one after another, and report each as soon as it is done.

    :param names: Names of the experiments.
    :param folder: Where figures and JSON files go; exists.
    """
    console = Console(highlight=False)
    for experiment in _possible(names, settings, console):
        outcome = _run(experiment, settings, console)
        for table in outcome.tables:
            _print(table, console)
        _write(experiment, outcome, settings, folder, console)


def _possible(names: Sequence[str], settings: Settings, console: Console) -> list[Experiment]:
    """
    The experiments for which the data and a method are there; says what is left out, and why.

    :raises ParameterError: If none of them can use a method that was asked for.
    """
    found = []
    for experiment in map(EXPERIMENTS.__getitem__, names):
        if experiment is QM9 and not installed():
            console.print("qm9: skipped, it needs the distribution qm9pack (pip install qm9pack)")
            continue
        reasons = [refusal(experiment.make, name) for name in settings.methods or ()]
        for method, reason in zip(settings.methods or (), reasons, strict=True):
            if reason is not None:
                # Not as markup: reasons have brackets.
                console.print(f"{experiment.name}: without {method}. {reason}", markup=False)
        if settings.methods is None or None in reasons:
            found.append(experiment)
    if settings.methods is not None and not found:
        raise ParameterError(
            "--methods", "methods that an experiment can use", ", ".join(settings.methods)
        )
    return found


def _run(experiment: Experiment, settings: Settings, console: Console) -> Outcome:
    # The generator of the program that calls is left as it was.
    with progress_bar(console) as bar, torch.random.fork_rng(devices=[]), one_thread():
        task = bar.add_task(experiment.name, total=experiment.work(settings))
        return experiment.run(settings, partial(bar.advance, task))


def _print(table: Table, console: Console) -> None:
    console.print(Text(table.title, style="bold"))
    drawn = new_table()
    drawn.add_column(table.columns[0])
    for column in table.columns[1:]:
        drawn.add_column(column, justify="right")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    if table.note:
        console.print(Text(table.note))
        console.print()


def _write(
    experiment: Experiment, outcome: Outcome, settings: Settings, folder: Path, console: Console
) -> None:
    data = {
        "experiment": experiment.name,
        "settings": asdict(settings),
        "tables": [asdict(table) for table in outcome.tables],
        "data": outcome.data,
    }
    path = folder / f"{experiment.name}.json"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    written = [path]
    if outcome.picture is not None:
        written.append(folder / f"{experiment.name}.png")
        save(outcome.picture(), written[-1])
    console.print(Text(f"Written: {', '.join(map(str, written))}"), soft_wrap=True)
    console.print()
