"""What a person sees in the terminal: a progress bar while training, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from jdcore.demo.training import Run

TASKS = ("left", "right")


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that shows on a terminal and leaves pipes and files alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def new_table() -> Table:
    """An empty table in the style of all results."""
    return Table(box=box.SIMPLE_HEAD)


def results_table(runs: Sequence[Run]) -> Table:
    """One row per run: test accuracies, final losses, share of steps with a conflict."""
    table = new_table()
    table.add_column("method")
    for quantity in ("accuracy", "loss"):
        for task in TASKS:
            table.add_column(f"{task}\n{quantity}", justify="right")
    table.add_column("steps in\nconflict", justify="right")
    for run in runs:
        table.add_row(*_cells(run))
    return table


def _cells(run: Run) -> Iterator[str]:
    yield run.method
    yield from (f"{accuracy:.1%}" for accuracy in run.accuracies)
    yield from (f"{run.final_loss(task):.3f}" for task in range(len(TASKS)))
    yield f"{run.conflict_share:.1%}"


def remarks(runs: Sequence[Run]) -> Iterator[str]:
    """What a reader of the table has to know."""
    yield (
        "Accuracy: test pairs read correctly. Loss: training, mean of the last tenth of the steps. "
        "Conflict: the update has a negative inner product with the gradient of a task."
    )
    yield (
        "This is one setting, a narrow trunk and plain SGD, where the tasks compete. In others a "
        "tuned mean does as well: `jdcore bench overlaid single` shows that, with its spread."
    )
    for run in runs:
        if run.diverged:
            yield f"{run.method} was stopped at step {len(run.steps)}: its update is not finite."
