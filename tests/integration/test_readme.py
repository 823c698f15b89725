"""The texts at the root say what is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from jdcore import describe, list_plugins

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "jdplugins/jdplugins-standard/README.md")

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


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert blocks("README.md", "bash")[1] in text_of(".ci/run").splitlines(keepends=True)


@pytest.mark.parametrize("readme", READMES)
def test_the_python_examples_run(readme: str) -> None:
    examples = blocks(readme, "python")

    assert examples
    for example in examples:
        exec(compile(example, readme, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_methods_is_that_of_the_specs(readme: str, generator: ModuleType) -> None:
    text = text_of(readme)

    assert generator.with_table(text) == text, "run: python docs/_generate_readme_table.py"


@pytest.mark.parametrize("readme", READMES)
def test_relative_links_lead_somewhere(readme: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text_of(readme))
    folder = (ROOT / readme).parent

    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_changelog_mentions_every_method(name: str) -> None:
    assert f"`{describe(name).class_name}`" in text_of("CHANGELOG.md")


def test_the_tools_that_tox_installs_are_pinned() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", text_of(".ci/constraints.txt"), re.MULTILINE))
    named = set(re.findall(r"^test_tools = (.*)$", text_of("tox.ini"), re.MULTILINE)[0].split())

    assert named | {"ruff", "mypy", "tox", "torch", "numpy"} <= pinned
