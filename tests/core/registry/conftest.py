from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.environments import clean_environment, make_environment

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="session")
def plugin_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Interpreter of a fresh virtual environment with every fixture distribution installed.

    The modules that use it are one group for xdist, so that it is made once.
    """
    folder = tmp_path_factory.mktemp("plugins")
    packages = sorted(path.parent for path in FIXTURES.glob("*/__init__.py"))
    return make_environment(folder / "venv", *[_distribution(p, folder) for p in packages])


_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"

[project.entry-points."jdcore.plugins"]
{name} = "{package}"
"""


def _distribution(package: Path, folder: Path) -> Path:
    """The distribution of a package, as its author would lay it out."""
    name = package.name.replace("_", "-")
    shutil.copytree(package, folder / name / package.name)
    project = _PROJECT.format(name=name, package=package.name)
    (folder / name / "pyproject.toml").write_text(project)
    return folder / name


Run = Callable[..., Any]


@pytest.fixture
def run(plugin_python: Path, tmp_path: Path) -> Run:
    """
    Run code in the environment with the fixture distributions; return what it assigned to `result`.

    `plugins` sets JDCORE_PLUGINS; other keyword arguments are further environment variables.
    """

    def run_code(code: str, plugins: str | None = None, **variables: str) -> Any:
        env = clean_environment(**variables)
        if plugins is not None:
            env["JDCORE_PLUGINS"] = plugins
        script = f"import json, jdcore\n{code}\nprint('RESULT' + json.dumps(result))"
        done = subprocess.run(
            [plugin_python, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("RESULT")[2])

    return run_code
