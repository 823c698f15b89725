"""The ``jdcore`` command. Torch is imported only by the commands that compute."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from jdcore._commands import check, doctor, info, listing, new, plugins
from jdcore.bench import command as bench
from jdcore.demo import command as demo
from jdcore.errors import JDCoreError

__all__ = ["main"]

_COMMANDS = (demo, bench, listing, info, plugins, doctor, check, new)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage, which would bury the one line that matters.
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jdcore", description="Jacobian descent for PyTorch.")
    parser.add_argument("--version", action="version", version=f"jdcore {version('jdcore')}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments without the program's name; those of the process if None.
    :returns: The exit code: 0, 1 if `doctor` or `check` found something broken, 2 for bad input
        (one line on standard error), 130 if interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # how argparse ends, after --help too
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except JDCoreError as error:
        print(f"jdcore {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `jdcore list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0
