"""
What discovery costs with many installed distributions.

    python tests/benchmarks/discovery.py

Every measurement is a fresh process, since discovery happens once in each. 0 is the environment
that runs this; N adds N distributions without plugins, with metadata of a usual size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COUNTS = (0, 100, 300, 1000)
REPETITIONS = 7

_MEASURE = """
import json, sys, time
sys.path.append(sys.argv[1])
start = time.perf_counter()
import jdcore
imported = time.perf_counter()
from importlib.metadata import entry_points
entry_points(group="a.group.that.nobody.has")
scanned = time.perf_counter()
jdcore.list_aggregators()
listed = time.perf_counter()
jdcore.list_aggregators()
again = time.perf_counter()
print(json.dumps([imported - start, scanned - imported, listed - scanned, again - listed]))
"""
_COLUMNS = ("import jdcore", "entry_points()", "first listing", "second listing")

_METADATA = (
    """\
Metadata-Version: 2.4
Name: distribution-{index}
Version: 1.0
Summary: One of many.
Requires-Dist: numpy
Requires-Dist: torch

"""
    + "A long description.\n" * 200
)


def main() -> None:
    """Print a table of milliseconds, the median of several processes each."""
    print(f"{'distributions':>13}  " + "  ".join(f"{name:>14}" for name in _COLUMNS))
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            install(count, Path(folder))
            runs = [measure(folder) for _ in range(REPETITIONS)]
        medians = [1e3 * statistics.median(column) for column in zip(*runs, strict=True)]
        print(f"{count:>13}  " + "  ".join(f"{value:>11.2f} ms" for value in medians))


def install(count: int, folder: Path) -> None:
    """Make distributions as far as importlib.metadata can tell; every third has a command."""
    for index in range(count):
        info = folder / f"distribution_{index}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(_METADATA.format(index=index))
        if index % 3 == 0:
            entry = f"[console_scripts]\ncommand-{index} = distribution_{index}:main\n"
            (info / "entry_points.txt").write_text(entry)


def measure(folder: str) -> list[float]:
    """Seconds of each step in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, folder],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    seconds: list[float] = json.loads(done.stdout)
    return seconds


if __name__ == "__main__":
    main()
