"""``jdcore plugins``: what became of every installed plugin. Imports no method, and no torch."""

from __future__ import annotations

import argparse
from typing import Any

from jdcore._commands._output import plugins_on_stderr, print_json, print_table
from jdcore._commands._records import plugin_records

_NOUNS = {
    "aggregators": "aggregator",
    "scalarizers": "scalarizer",
    "solvers": "solver",
    "gramian_rules": "Gramian rule",
}
"""What one of each kind is called, by the key of the records."""

_COLUMNS = ("distribution", "version", "entry point", "status", "provides")


def add_parser(commands: Any) -> None:
    """Add ``plugins`` to the commands of the program."""
    parser = commands.add_parser("plugins", help="show installed plugins, and why some failed")
    parser.add_argument("--json", action="store_true", help="as JSON, with tracebacks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plugins."""
    with plugins_on_stderr():
        records = list(plugin_records())
    if arguments.json:
        print_json(records)
    elif records:
        print_table(_COLUMNS, [_row(record) for record in records])
    else:
        print(
            "No plugin is installed. The methods of the literature: pip install jdplugins-standard"
        )
    return 0


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    counts = (_count(len(record[kind]), noun) for kind, noun in _NOUNS.items())
    provides = record["reason"] or ", ".join(filter(None, counts)) or "nothing"
    return (
        record["distribution"],
        record["version"],
        record["entry_point"],
        record["status"],
        provides,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""
