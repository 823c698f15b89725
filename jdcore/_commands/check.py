"""``jdcore check NAME``: the conformance kit on one method or scalarizer."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from jdcore._commands._records import discover

if TYPE_CHECKING:
    from jdcore.testing import ConformanceCheck


def add_parser(commands: Any) -> None:
    """Add ``check`` to the commands of the program."""
    parser = commands.add_parser(
        "check",
        help="test whether a method keeps its promises",
        description="Run the conformance kit on one method. Exit code 1 if a check fails.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the method, in any spelling")
    parser.add_argument(
        "--scalarizer", action="store_true", help="the scalarizer of this name, not the aggregator"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Run every check, one line each.

    :returns: 1 if a check failed, else 0.
    :raises JDCoreError: If there is no such method, or it cannot be imported.
    """
    discover()
    from jdcore._methods import aggregator_class, scalarizer_class
    from jdcore.testing import checks_of, scalarizer_checks

    name = arguments.name
    # Each check of what cannot be imported would fail, for the same reason.
    scalarizer_class(name) if arguments.scalarizer else aggregator_class(name)
    checks = scalarizer_checks(name) if arguments.scalarizer else checks_of(name)
    verdicts = [_verdict(check) for check in checks]
    counts = ((word, verdicts.count(word)) for word in ("passed", "failed", "skipped"))
    print(", ".join(f"{count} {word}" for word, count in counts if count))
    return 1 if "failed" in verdicts else 0


def _verdict(check: ConformanceCheck) -> str:
    from jdcore.testing import ConformanceError, NotApplicable

    verdict, reason = "passed", ""
    try:
        check.run()
    except ConformanceError as error:
        verdict, reason = "failed", str(error)
    except NotApplicable as error:
        verdict, reason = "skipped", str(error)
    line = f"{verdict:7}  {check.check.__name__}"
    print(f"{line}: {reason}" if reason else line)
    sys.stdout.flush()  # the checks of slow methods take seconds; a pipe shall see them come
    return verdict
