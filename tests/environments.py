"""Virtual environments for tests of real installations."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def make_environment(folder: Path, *distributions: Path) -> Path:
    """
    Make a virtual environment on top of the one that runs the tests.

    The packages under test and torch are seen from there: installing torch once more would take
    longer than all other tests together.

    :param folder: Where the environment goes.
    :param distributions: Folders of distributions to install.
    :returns: Its interpreter.
    """
    venv.create(folder, symlinks=True)
    [purelib] = folder.glob("lib/python*/site-packages")
    parent = sysconfig.get_paths()["purelib"]
    (purelib / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    python = folder / "bin" / "python"
    install(python, *distributions)
    return python


def install(python: Path, *distributions: Path) -> None:
    """Install distributions from their folders, again if they are there already, offline."""
    if not distributions:
        return
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    options = ["-q", "--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    subprocess.run([*pip, "install", *options, *distributions], check=True, cwd=python.parent)


def clean_environment(**variables: str) -> dict[str, str]:
    """The variables of this process, without those that steer jdcore or pytest."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JDCORE_", "PYTEST_"))}
    return kept | {"PYTHONSAFEPATH": "1"} | variables
