"""``jdcore new``: what it writes can be installed, and its tests pass."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from jdcore._commands import new
from jdcore.cli import main
from tests.environments import clean_environment, make_environment


def test_a_new_distribution_has_every_file_and_no_placeholder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["--method", "fair_mean", "--class-name", "FAIRMean"]
    assert main(["new", "My.Methods", *method, "--out", str(tmp_path)]) == 0

    folder = tmp_path / "my-methods"
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert written == {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/my_methods/__init__.py",
        "src/my_methods/__init__.pyi",
        "src/my_methods/fair_mean.py",
        "src/my_methods/plugin.py",
        "src/my_methods/py.typed",
        "tests/test_conformance.py",
        "tests/test_fair_mean.py",
        "tests/test_types.py",
    }
    assert all("$" not in (folder / name).read_text() for name in written)
    assert "class FAIRMeanWeighting" in (folder / "src/my_methods/fair_mean.py").read_text()
    assert f"cd {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["jdcore"], "Parameter `NAME` must be letters, digits and dashes, and no package of"),
        (["jdplugins"], "got 'jdplugins'."),
        (["My Methods"], "got 'My Methods'."),
        (["../escape"], "Parameter `NAME` must be"),
        (["my-methods", "--method", "FairMean"], "Parameter `--method` must be a lower snake case"),
        (["my-methods", "--method", "class"], "Parameter `--method` must be"),
        (["my-methods", "--class-name", "Other"], "Parameter `--class-name` must be 'norm_mean'"),
        (["my-methods", "--class-name", "norm-mean"], "Parameter `--class-name` must be"),
        (["import"], "Parameter `NAME` must be"),
        (["torch"], "Parameter `NAME` must be"),
        (["json"], "Parameter `NAME` must be"),
        *[
            (["mine", "--method", name], f"`--method` .*got {name!r}")
            for name in sorted(new._TAKEN_METHODS)
        ],
    ],
)
def test_names_that_cannot_be_used_are_refused_and_nothing_is_written(
    argv: list[str],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["new", *argv]) == 2

    assert re.search(problem, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my-methods").mkdir()

    assert main(["new", "my-methods", "--out", str(tmp_path)]) == 2

    assert "(File exists)" in capsys.readouterr().err
    assert list((tmp_path / "my-methods").iterdir()) == []


def test_methods_whose_files_would_have_one_name_are_those_that_are_refused() -> None:
    names = {Path(target).stem for target in new._FILES.values() if "$method" not in target}
    clashing = {name for name in names if not name.startswith(("_", "."))}
    modules = {stem for stem in clashing if f"src/$package/{stem}.py" in new._FILES.values()}
    tests = {stem.removeprefix("test_") for stem in clashing if stem.startswith("test_")}
    assert modules | tests == new._TAKEN_METHODS


def test_every_file_of_the_template_is_used() -> None:
    folder = Path(new.__file__).parents[1] / "_template"

    assert {p.name.removesuffix(".txt") for p in folder.glob("*.txt")} == set(new._FILES)


@pytest.mark.slow
@pytest.mark.artefacts
def test_the_tests_of_a_new_distribution_pass_once_it_is_installed(tmp_path: Path) -> None:
    assert main(["new", "my-methods", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "my-methods"
    python = make_environment(tmp_path / "venv", folder)

    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        tests, cwd=folder, env=clean_environment(), capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout
