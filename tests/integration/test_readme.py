"""The texts at the root say what is so."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from jdcore import describe, list_plugins

ROOT = Path(__file__).parents[2]
READMES = (
    "README.md",
    "jdplugins/jdplugins-standard/README.md",
    "jdplugins/jdplugins-robust/README.md",
)

# Of the installed plugins only: other tests register methods of their own.
METHODS = [spec.name for plugin in list_plugins() for spec in plugin.aggregators]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = ROOT / "docs" / "_generate_readme_table.py"
    spec = importlib.util.spec_from_file_location("generate_readme_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_two_commands_of_one_line_each() -> None:
    commands = blocks("README.md", "bash")

    assert [command.count("\n") for command in commands] == [1, 1]
    assert commands[0].endswith(" && .venv/bin/jdcore demo\n")
    assert commands[1].endswith(" && .venv-tests/bin/tox run\n")


@pytest.mark.parametrize("status", [0, 3])
def test_ci_runs_the_test_command_of_the_readme_and_ends_as_it_does(
    tmp_path: Path, status: int
) -> None:
    [command] = [c for c in blocks("README.md", "bash") if c.endswith("tox run\n")]
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(ROOT / "README.md", tmp_path)
    # Stands for the environments, which that command would make.
    python = tmp_path / "python3"
    python.write_text(
        "#!/bin/sh\nmkdir -p .venv-tests/bin\nfor name in python tox; do\n"
        f"  printf '#!/bin/sh\\necho \"$0 $*\"; echo 3 passed, 1 skipped in 4.56s; exit {status}'"
        " > .venv-tests/bin/$name\n  chmod +x .venv-tests/bin/$name\ndone\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "3 passed, 1 skipped in 4.56s"
    first = done.stdout.splitlines()[0].split()
    assert " ".join(first) in command


@pytest.mark.parametrize("readme", READMES)
def test_the_python_examples_run(readme: str) -> None:
    examples = blocks(readme, "python")

    assert examples
    for example in examples:
        exec(compile(example, readme, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_methods_is_that_of_the_specs(readme: str, generator: ModuleType) -> None:
    text = text_of(readme)

    listed = generator.READMES[readme]
    assert generator.with_table(text, listed) == text, "run: python docs/_generate_readme_table.py"


@pytest.mark.parametrize("readme", READMES)
def test_relative_links_lead_somewhere(readme: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text_of(readme))
    folder = (ROOT / readme).parent

    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_changelog_mentions_every_method(name: str) -> None:
    assert f"`{describe(name).class_name}`" in text_of("CHANGELOG.md")


def test_the_changelog_mentions_every_scalarizer() -> None:
    specs = [spec for plugin in list_plugins() for spec in plugin.scalarizers]
    text = text_of("CHANGELOG.md")

    assert [spec.name for spec in specs if f"`{spec.class_name}`" not in text] == []


def test_the_tools_that_tox_installs_are_pinned() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", text_of(".ci/constraints.txt"), re.MULTILINE))
    named = re.findall(
        r"^(?:tools|libraries|build) = ((?:.*\\\n)*.*)$", text_of("tox.ini"), re.MULTILINE
    )

    assert {
        *" ".join(named).replace("\\", "").split(),
        "ruff",
        "mypy",
        "tox",
        "torch",
        "numpy",
    } <= pinned


def test_the_types_of_every_distribution_are_checked() -> None:
    listed = re.findall(
        r'"\$MYPY_CONFIG_FILE_DIR/(jdplugins/[^"*]+)/src"', text_of("pyproject.toml")
    )

    assert sorted(listed) == sorted(f"jdplugins/{p.name}" for p in ROOT.glob("jdplugins/*-*"))
