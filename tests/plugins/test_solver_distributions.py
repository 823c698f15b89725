"""What the distributions of solvers hold, and what their texts say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.plugins.distributions import needs

PLUGINS = Path(__file__).parents[2] / "jdplugins"
NAMES = ("cvxpy", "quadprog")
INSTALLED = [
    pytest.param(name, marks=[needs(f"jdplugins-{name}"), needs("jdplugins-standard")])
    for name in NAMES
]


def folder(name: str) -> Path:
    return PLUGINS / f"jdplugins-{name}"


@pytest.mark.slow
@pytest.mark.artefacts
@pytest.mark.parametrize("name", NAMES)
def test_the_wheel_from_the_sdist_holds_the_package_and_nothing_else(
    name: str, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, folder(name)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)

    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        texts = {n.rpartition("/")[2]: archive.read(n).decode() for n in held if "dist-info" in n}
    package = folder(name) / "src" / "jdplugins" / name
    expected = {f"jdplugins/{name}/{p.name}" for p in package.iterdir() if p.is_file()}
    assert {n for n in held if "dist-info" not in n} == expected
    assert f"jdplugins/{name}/py.typed" in held
    assert texts["entry_points.txt"].split("\n") == [
        "[jdcore.plugins]",
        f"{name} = jdplugins.{name}.plugin",
        "",
    ]
    assert message_from_string(texts["METADATA"])["License-Expression"] == "MIT"


@pytest.mark.parametrize("name", NAMES)
def test_every_bound_of_a_dependency_has_its_reason(name: str) -> None:
    text = (folder(name) / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]

    assert lines.count("\n") >= 3
    for line in lines.splitlines():
        assert re.fullmatch(r'    "[a-z]+>=[^"]+", +# \w.+', line), line


@pytest.mark.parametrize("name", INSTALLED)
def test_the_code_in_the_readme_runs(name: str) -> None:
    text = (folder(name) / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    assert code
    exec(compile("\n".join(code), "README.md", "exec"), {})


@pytest.mark.parametrize("name", INSTALLED)
def test_the_examples_of_the_solvers_run(name: str) -> None:
    package = importlib.import_module(f"jdplugins.{name}")
    modules = [m.name for m in pkgutil.iter_modules(package.__path__, f"jdplugins.{name}.")]
    results = [doctest.testmod(importlib.import_module(module)) for module in modules]

    assert sum(r.failed for r in results) == 0
    assert sum(r.attempted for r in results) >= 3


@pytest.mark.parametrize("name", INSTALLED)
def test_describing_the_solvers_imports_none(name: str) -> None:
    code = (
        f"import sys, jdplugins.{name}.plugin as p; list(p.jdcore_solvers());"
        "print({'torch', 'numpy', 'cvxpy', 'ecos', 'quadprog', 'qpsolvers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"
