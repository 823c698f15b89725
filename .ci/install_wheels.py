"""Build every distribution of this repository and install the wheels: install_wheels.py FOLDER."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (ROOT, *sorted((ROOT / "jdplugins").glob("jdplugins-*")))
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def main(folder: Path) -> None:
    """Sdist first, then the wheel from the sdist, so that an incomplete sdist fails here."""
    shutil.rmtree(folder, ignore_errors=True)
    for distribution in DISTRIBUTIONS:
        _python("build", "--no-isolation", "--outdir", str(folder), str(distribution))
    wheels = [
        f"{w}[demo]" if w.name.startswith("jdcore-") else str(w) for w in folder.glob("*.whl")
    ]
    # The same version may be there from an earlier run, and pip takes that for up to date.
    plugins = [distribution.name for distribution in DISTRIBUTIONS[1:]]
    _python("pip", "uninstall", "-y", "-q", "jdcore", *plugins)
    _python("pip", "install", "-c", str(CONSTRAINTS), *wheels)


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
