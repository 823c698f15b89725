"""
Build distributions of this repository and install the wheels: install_wheels.py FOLDER WHICH.

WHICH is `core` (the core alone), `light` (and the plugins that need nothing but the core), `all`
(every distribution, with what the demo needs), `lowest` or `newest` (all, with the lowest or newest
versions of what they depend on; the other ones use the versions that are pinned).

The distributions are found by their folders, jdplugins/jdplugins-*.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = sorted((ROOT / "jdplugins").glob("jdplugins-*"))
PINNED = ("-c", str(ROOT / ".ci" / "constraints.txt"))


def main(folder: Path, which: str) -> None:
    """Build, install, and bring the dependencies to the versions that were asked for."""
    chosen = [ROOT] if which == "core" else [ROOT, *filter(_is_light, PLUGINS)]
    if which not in ("core", "light"):
        chosen = [ROOT, *PLUGINS]
    extra = "" if which in ("core", "light") else "[demo]"
    wheels = [
        f"{w}{extra}" if w.name.startswith("jdcore-") else str(w) for w in _built(folder, chosen)
    ]
    # The same version may be there from an earlier run, and pip takes that for up to date.
    names = ["jdcore", *(plugin.name for plugin in PLUGINS)]
    _python("pip", "uninstall", "-y", "-q", *names)
    if which == "newest":
        _python("pip", "install", "-q", "-U", "--upgrade-strategy", "eager", *wheels)
    elif which == "lowest":
        _python("pip", "install", "-q", "--no-deps", *(w.removesuffix(extra) for w in wheels))
        _python("pip", "install", "-q", *wheels, *_lowest(names))
    else:
        _python("pip", "install", "-q", *PINNED, *wheels)


def _is_light(plugin: Path) -> bool:
    """Whether a plugin depends on distributions of this repository only."""
    text = (plugin / "pyproject.toml").read_text(encoding="utf-8")
    lines = text.partition("\ndependencies = [\n")[2].partition("\n]")[0].splitlines()
    return all(line.strip().startswith(('"jdcore', '"jdplugins-')) for line in lines)


def _built(folder: Path, distributions: list[Path]) -> list[Path]:
    """Sdist first, then the wheel from the sdist, so that an incomplete sdist fails here."""
    shutil.rmtree(folder, ignore_errors=True)
    for distribution in distributions:
        _python("build", "--no-isolation", "--outdir", str(folder), str(distribution))
    return sorted(folder.glob("*.whl"))


def _lowest(names: list[str]) -> list[str]:
    """What the installed distributions require, each at its lower bound."""
    from packaging.requirements import Requirement  # comes with pytest

    found = {}
    for name in names:
        for requirement in map(Requirement, requires(name) or ()):
            bounds = [s.version for s in requirement.specifier if s.operator == ">="]
            if bounds and requirement.name not in names:
                found[requirement.name] = f"{requirement.name}=={bounds[0]}"
    return sorted(found.values())


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
