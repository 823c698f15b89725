"""Tables for people, plain text for pipes, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from typing import Any

_GAP = "  "


@contextmanager
def plugins_on_stderr() -> Iterator[None]:
    """
    Send what is printed meanwhile to standard error.

    Standard output belongs to the command: plugins that print when they are imported, in Python or
    by a library in C, would spoil its JSON and its tables.
    """
    with redirect_stdout(sys.stderr):
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()  # what the command has printed before
        kept = os.dup(1)
        try:
            with suppress(OSError):  # without standard error there is nowhere to send it
                os.dup2(2, 1)
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def print_json(data: Any) -> None:
    """Print data as JSON, in ASCII where the output cannot show everything."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    print(json.dumps(data, indent=2, ensure_ascii=not encoding.startswith("utf")))


def draws_tables() -> bool:
    """Whether tables are drawn: on a terminal, if rich is installed."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: drawn, or as plain text aligned with two spaces."""
    if draws_tables():
        _print_rich(columns, rows)
    else:
        _print_plain([columns, *rows])


def _print_rich(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, since brackets would be taken for markup
    Console().print(table)


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(_GAP.join(cells).rstrip())
