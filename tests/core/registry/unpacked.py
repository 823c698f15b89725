"""Distributions as they lie in a folder of ``sys.path``, each damaged as the test wants it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.environments import clean_environment

SPEC = """
def spec(name, factory="nowhere:NowhereWeighting"):
    return AggregatorSpec(name=name, summary="For tests.", weighting=factory, api_version=1)
"""

PLUGIN = f"""
from jdcore import AggregatorSpec, hookimpl
{SPEC}
@hookimpl
def jdcore_aggregators():
    yield spec("{{method}}")
"""
"""Source of a plugin that provides one method."""


def unpack(
    folder: Path,
    name: str,
    files: Mapping[str, str],
    *,
    metadata: bytes | None = b"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    entry_points: bytes = b"[jdcore.plugins]\n{name} = {package}\n",
) -> None:
    """
    Lay a distribution out as pip would.

    :param files: Sources by path.
    :param metadata: Content of METADATA, or None for a distribution without.
    :param entry_points: Content of entry_points.txt.
    """
    package = name.replace("-", "_")
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    for file, content in (("METADATA", metadata), ("entry_points.txt", entry_points)):
        if content is not None:
            filled = content.replace(b"{name}", name.encode())
            (info / file).write_bytes(filled.replace(b"{package}", package.encode()))


def run(folder: Path, code: str, *, timeout: float = 30, **variables: str) -> Any:
    """
    Run code in a process that sees the distributions of a folder; return its `result`.

    A process that takes longer than `timeout` seconds hangs, and fails the test.
    """
    script = f"import json, jdcore\n{code}\nprint('RESULT' + json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(PYTHONPATH=str(folder), **variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])
