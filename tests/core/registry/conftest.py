from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="session")
def plugin_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a fresh virtual environment with every fixture distribution installed."""
    root = tmp_path_factory.mktemp("plugins") / "venv"
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    # The packages under test and torch come from the environment that runs the tests: installing
    # torch once more would take longer than all other tests together.
    [purelib] = root.glob("lib/python*/site-packages")
    parent = sysconfig.get_paths()["purelib"]
    (purelib / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    isolation = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    distributions = sorted(p for p in FIXTURES.iterdir() if (p / "pyproject.toml").exists())
    subprocess.run([*install, *isolation, *distributions], check=True, cwd=root)
    return python


Run = Callable[..., Any]


@pytest.fixture
def run(plugin_python: Path, tmp_path: Path) -> Run:
    """
    Run code in the environment with the fixture distributions; return what it assigned to `result`.

    `plugins` sets JDCORE_PLUGINS; other keyword arguments are further environment variables.
    """

    def run_code(code: str, plugins: str | None = None, **variables: str) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("JDCORE_")}
        env |= {"PYTHONSAFEPATH": "1"} | variables
        if plugins is not None:
            env["JDCORE_PLUGINS"] = plugins
        script = f"import json, jdcore\n{code}\nprint('RESULT' + json.dumps(result))"
        done = subprocess.run(
            [plugin_python, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("RESULT")[2])

    return run_code
