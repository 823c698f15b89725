"""The documentation builds without a warning, and what it says is so."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

import jdcore
from jdcore import aggregation, autogram, autojac, get_aggregator
from jdcore.cli import _COMMANDS, main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def test_every_page_is_in_the_table_of_contents() -> None:
    [contents] = blocks("index", "{toctree}")

    assert set(PAGES) - {"index"} <= set(contents.split())


def test_the_example_on_the_first_page_runs() -> None:
    [example] = blocks("index", "python")

    exec(compile(example, "index.md", "exec"), {"__name__": "example"})


def test_the_loop_with_an_optimizer_in_the_backward_pass_trains() -> None:
    [example] = blocks("training-loops", "python")
    scope: dict[str, Any] = {"__name__": "example"}
    torch.manual_seed(0)
    before = torch.nn.Linear(3, 2).weight
    torch.manual_seed(0)
    exec(compile(example, "training-loops.md", "exec"), scope)
    assert not torch.equal(scope["model"].weight, before)
    assert scope["model"].weight.grad is None  # the hook has used it


def test_the_configuration_file_of_the_documentation_makes_an_aggregator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("yaml")
    [file], [example] = blocks("configuration", "yaml"), blocks("configuration", "python")
    (tmp_path / "config.yaml").write_text(file)
    monkeypatch.chdir(tmp_path)

    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "configuration.md", "exec"), scope)

    expected = get_aggregator({"name": "upgrad", "pref_vector": [0.25, 0.75]})
    assert repr(scope["aggregator"]) == repr(expected)


def test_every_command_is_documented_and_every_documented_one_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    documented = re.findall(r"^\| `jdcore (\w+)", text_of("command-line"), re.MULTILINE)
    main(["--help"])
    shown = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)

    assert sorted(documented) == sorted(shown)
    assert len(documented) == len(_COMMANDS)


def test_what_the_migration_page_imports_is_there() -> None:
    imports = re.findall(r"`from jdcore\.(\w+) import ([\w, ]+)`", text_of("migration"))
    modules = {"autojac": autojac, "autogram": autogram, "aggregation": aggregation}

    assert {module for module, _ in imports} == set(modules)
    for module, names in imports:
        assert all(hasattr(modules[module], name) for name in names.split(", "))


def test_every_environment_variable_is_in_the_one_table() -> None:
    package = Path(jdcore.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    documented = re.findall(r"^\| `(JDCORE_\w+)", text_of("environment"), re.MULTILINE)

    assert sorted(documented) == sorted(set(re.findall(r"JDCORE_[A-Z_]+[A-Z]", sources)))


@pytest.mark.slow
@pytest.mark.artefacts
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs Sphinx (tox -e full)")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    methods = (tmp_path / "html" / "_generated" / "methods.html").read_text()
    assert "jdcore.aggregation.UPGrad" in methods
    check_pages(tmp_path / "html")


class Addresses(HTMLParser):
    """What a page loads, and the links to follow from it; and the names of its places."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        if "id" in given:
            self.places.add(given["id"])
        loads = tag in ("script", "img", "source", "iframe") or (
            tag == "link" and given.get("rel") in ("stylesheet", "icon", "shortcut icon")
        )
        if loads and ("src" in given or "href" in given):
            self.loaded.append(given.get("src") or given["href"])
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])


def check_pages(folder: Path) -> None:
    """Pages load nothing from a network, and every link between them leads somewhere."""
    pages = {}
    for path in folder.rglob("*.html"):
        if "_modules" in path.parts:
            continue  # sources, whose way back Sphinx gets wrong for names that are exported again
        pages[path.resolve()] = parser = Addresses()
        parser.feed(path.read_text(encoding="utf-8"))
    for path, parser in pages.items():
        for address in parser.loaded:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert (path.parent / urlsplit(address).path).exists(), f"{path.name}: {address}"
        for address in parser.linked:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {address}"
            if parts.fragment and target in pages:
                places = pages[target].places
                assert unquote(parts.fragment) in places, f"{path.name}: {address}"
