"""``jdcore list``: every method, scalarizer or rule there is. Imports none, and no torch."""

from __future__ import annotations

import argparse
from typing import Any

from jdcore._commands._output import (
    draws_tables,
    plugins_on_stderr,
    print_json,
    print_table,
)
from jdcore._commands._records import records_of, rule_records
from jdcore._discovery import AGGREGATOR, SCALARIZER

_SCALARIZER_COLUMNS = ("name", "kind", "provided by", "summary")
_RULE_COLUMNS = ("name", "operation", "provided by", "summary")
_COLUMNS = ("name", "input", "kind", "properties", "provided by", "summary")


def add_parser(commands: Any) -> None:
    """Add ``list`` to the commands of the program."""
    parser = commands.add_parser("list", help="show every aggregation method")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--scalarizers", action="store_true", help="what makes one loss of several, instead"
    )
    kinds.add_argument(
        "--rules", action="store_true", help="the operations with rules of plugins, instead"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the methods, the scalarizers, or the rules."""
    kind = SCALARIZER if arguments.scalarizers else AGGREGATOR
    with plugins_on_stderr():
        records = rule_records() if arguments.rules else records_of(kind)
    if arguments.json:
        print_json(records)
    elif arguments.rules:
        print_table(_RULE_COLUMNS, [_rule_row(record) for record in records])
    elif arguments.scalarizers:
        print_table(_SCALARIZER_COLUMNS, [_scalarizer_row(record) for record in records])
    elif records and draws_tables():
        print_table(("name", "method"), [_short_row(record) for record in records])
    elif records:
        print_table(_COLUMNS, [_row(record) for record in records])
    return 0


def scalarizer_kinds(record: dict[str, Any]) -> str:
    """What a user of a scalarizer has to know, in a few words."""
    kinds = [kind for kind in ("trainable", "stateful", "stochastic") if record[kind]]
    return ", ".join([*kinds, *(["positive losses"] if record["positive"] else [])])


def _scalarizer_row(record: dict[str, Any]) -> tuple[str, ...]:
    if "summary" not in record:
        return record["name"], "", "", f"not installed: {record['install']}"
    return record["name"], scalarizer_kinds(record), record["distribution"], record["summary"]


def _rule_row(record: dict[str, Any]) -> tuple[str, ...]:
    return record["name"], record["operation"], record["distribution"], record["summary"]


def _short_row(record: dict[str, Any]) -> tuple[str, ...]:
    """For a terminal, too narrow for all columns: everything but the name below the summary."""
    name, source, kind, properties, provider, summary = _row(record)
    facts = ", ".join(filter(None, (source, kind, provider and f"from {provider}")))
    return name, "\n".join(filter(None, (summary, facts, properties))) + "\n"


def inputs(record: dict[str, Any]) -> str:
    """What a method looks at, in a few words."""
    return f"{record['input']}, losses" if record["losses"] else str(record["input"])


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    if "summary" not in record:
        return (record["name"], "", "", "", "", f"not installed: {record['install']}")
    summary = record["summary"]
    if not record["installed"]:
        summary = f"{summary} Needs: {record['install']}"
    kinds = [kind for kind in ("wrapper", "stateful", "stochastic") if record[kind]]
    return (
        record["name"],
        inputs(record),
        ", ".join(kinds),
        ", ".join(record["properties"]),
        record["distribution"],
        summary,
    )
