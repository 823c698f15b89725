"""What type checkers and editors see of all methods is what there is."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from jdcore._catalogue import METHODS
from jdcore.cli import main
from tests.environments import clean_environment

ROOT = Path(__file__).parents[2]
CALLS = Path(__file__).parent / "calls.py"


def installed(*distributions: str) -> bool:
    try:
        return all(version(distribution) for distribution in distributions)
    except PackageNotFoundError:
        return False


needs_methods = pytest.mark.skipif(
    not installed(*METHODS), reason=f"needs {', '.join(METHODS)} installed"
)


@needs_methods
def test_the_stubs_are_those_of_the_classes() -> None:
    # In a process of its own, where no other test has registered a method.
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from _generate_stubs import stubs
print(*[p for p, text in stubs().items() if not p.exists() or p.read_text() != text], sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, ROOT / "docs"],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", "run: python docs/_generate_stubs.py"


@needs_methods
def test_the_classes_of_a_package_are_those_of_the_registry() -> None:
    import jdcore
    import jdcore.aggregation
    import jdplugins.robust as robust
    import jdplugins.standard as standard
    from jdplugins.standard import scalarization

    assert standard.UPGrad is jdcore.aggregation.UPGrad
    assert standard.UPGradWeighting is type(jdcore.get_weighting("upgrad"))
    assert robust.NNM is jdcore.aggregation.NNM
    assert scalarization.STCH is type(jdcore.get_scalarizer("stch"))
    assert {"UPGrad", "UPGradWeighting", "GradDrop"} <= set(dir(standard))
    for package, name in ((standard, "NNM"), (standard, "no_such_module"), (robust, "UPGrad")):
        with pytest.raises(AttributeError, match=f"provides no class '{name}'"):
            getattr(package, name)


@needs_methods
def test_the_command_compares_stubs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stubs", "jdplugins-robust", "--check"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["stubs", "no-such-distribution"]) == 2


def marked() -> set[int]:
    lines = CALLS.read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if "# wrong" in line}


@pytest.mark.slow
@pytest.mark.artefacts
@needs_methods
@pytest.mark.skipif(not installed("mypy"), reason="mypy is not installed")
def test_mypy_refuses_the_wrong_calls_and_no_other(tmp_path: Path) -> None:
    found, output = refused_by_mypy(tmp_path)

    assert found == marked(), output


def refused_by_mypy(folder: Path) -> tuple[set[int], str]:
    calls = folder / "calls.py"
    calls.write_text(CALLS.read_text(encoding="utf-8"), encoding="utf-8")
    checked = [sys.executable, "-m", "mypy", "--config-file", "", "--no-error-summary", "calls.py"]
    done = subprocess.run(
        checked, cwd=folder, env=clean_environment(), capture_output=True, text=True
    )
    numbers = re.findall(r"^calls\.py:(\d+): error", done.stdout, re.MULTILINE)
    return set(map(int, numbers)), done.stdout + done.stderr


PYRIGHT = [name for name in ("basedpyright", "pyright") if importlib.util.find_spec(name)]


@pytest.mark.slow
@pytest.mark.artefacts
@needs_methods
@pytest.mark.skipif(not PYRIGHT, reason="neither basedpyright nor pyright is installed")
def test_pyright_refuses_the_wrong_calls_and_no_other(tmp_path: Path) -> None:
    found, output = refused_by_pyright(tmp_path)

    assert found == marked(), output


def refused_by_pyright(folder: Path) -> tuple[set[int], str]:
    calls = folder / "calls.py"
    calls.write_text(CALLS.read_text(encoding="utf-8"), encoding="utf-8")
    settings = {"typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    checker = [sys.executable, "-m", PYRIGHT[0], "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*checker, "calls.py"], cwd=folder, env=clean_environment(), capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    errors = [d for d in report["generalDiagnostics"] if d["severity"] == "error"]
    return {d["range"]["start"]["line"] + 1 for d in errors}, done.stdout
