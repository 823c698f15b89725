"""The ``jdcore`` command. Torch is imported only by the commands that compute."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NoReturn, TextIO

from jdcore._commands import check, doctor, info, listing, new, plugins, stubs
from jdcore.bench import command as bench
from jdcore.demo import command as demo
from jdcore.errors import JDCoreError, one_line

__all__ = ["main"]

_COMMANDS = (demo, bench, listing, info, plugins, doctor, check, new, stubs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage, which would bury the one line that matters.
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # As in argparse, but for the errors of writing, which it keeps to itself.
        if message:
            (file or sys.stderr).write(message)


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
    :returns: The exit code: 0, 1 if `doctor`, `check` or `stubs --check` found something broken, 2
        for bad input or if the output cannot be written (one line on standard error), 130 if
        interrupted.
    """
    _open_streams()
    command = "jdcore"
    try:
        try:
            arguments = _parser().parse_args(argv)
        except SystemExit as stop:  # how argparse ends, after --help too
            # None is success in Python's own convention.
            code = stop.code if isinstance(stop.code, int) else 0
        else:
            command = f"jdcore {arguments.command}"
            code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    # Errors on purpose say all that there is to say; any other is a bug, with its traceback.
    except JDCoreError as error:
        return _fail(command, str(error))
    # 128 and the number of SIGINT, as shells have it.
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `jdcore list | head -3`
        _leave(sys.stdout)
        return 0
    except OSError as error:  # a full disk, be it under a file or under the output itself
        _leave(sys.stdout)
        where = f": {error.filename}" if error.filename else ""
        return _fail(command, f"{error.strerror or error}{where}")


_STOP = ("strict", "surrogateescape")  # the latter in the C locale; neither shows what is foreign


def _open_streams() -> None:
    """Let output go somewhere in any case: a closed stream is None, a narrow one raises."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
        elif getattr(stream, "errors", None) in _STOP and hasattr(stream, "reconfigure"):
            # Formulas and names of authors in a terminal of ASCII or cp1252.
            stream.reconfigure(errors="backslashreplace")


def _leave(stream: TextIO) -> None:
    """Drop what could not be written, which Python would try again when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(command: str, message: str) -> int:
    try:
        print(f"{command}: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # standard error may be full as well
        _leave(sys.stderr)
    return 2
