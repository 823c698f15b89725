"""The demo from data to figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from jdcore.demo.data import overlaid_digits
from jdcore.demo.figure import draw
from jdcore.demo.report import progress_bar, remarks, results_table
from jdcore.demo.training import steps_per_epoch, train
from jdcore.protocols import Aggregator


def compare(
    methods: Sequence[tuple[str, Aggregator]], *, folder: Path, epochs: int, seed: int
) -> None:
    """
    Train once per method on the same data, print a table, write ``demo.png``.

    :param methods: At most two pairs of a name, for the report, and an aggregator.
    :param folder: Where the figure goes; exists.
    """
    console = Console(highlight=False)
    digits = overlaid_digits(seed)
    total = epochs * steps_per_epoch(digits)
    runs = []
    with progress_bar(console) as bar:
        for name, aggregator in methods:
            advance = partial(bar.advance, bar.add_task(name, total=total))
            runs.append(train(name, aggregator, digits, epochs=epochs, seed=seed, advance=advance))
    console.print(results_table(runs))
    for remark in remarks(runs):
        console.print(remark, markup=False)
    path = folder / "demo.png"
    draw(path, runs, digits)  # last: on a full disk, the results are not lost with it
    console.print(f"Figure: {path}", markup=False, soft_wrap=True)
