"""``jdcore stubs NAME``: what editors and type checkers see of the methods of a distribution."""

from __future__ import annotations

import argparse
from typing import Any

from jdcore._commands._records import discover
from jdcore._discovery import normalize_distribution


def add_parser(commands: Any) -> None:
    """Add ``stubs`` to the commands of the program."""
    parser = commands.add_parser(
        "stubs",
        help="write the types of the methods of a distribution",
        description="Write the stubs of the packages of an installed distribution, __init__.pyi, "
        "which show its methods and their arguments to editors and type checkers.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the distribution, e.g. my-methods")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 if a stub is not up to date",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Write the stubs, or compare them.

    :returns: 1 if a stub is not what it would be, with ``--check``, else 0.
    :raises JDCoreError: If the distribution provides no methods.
    """
    # Its warning about broken plugins comes first, on standard error.
    discover()
    # Imports the methods, and torch with them, which other commands do without.
    from jdcore._stubs import stubs_of

    stale = 0
    for path, text in stubs_of(normalize_distribution(arguments.name)).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            print(f"{path}: up to date")
        elif arguments.check:
            print(f"{path}: stale, run: jdcore stubs {arguments.name}")
            stale = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: written")
    return stale
