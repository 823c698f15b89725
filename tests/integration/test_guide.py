"""docs/write-a-plugin.md, followed to the letter: every block of code in it is run, in order."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define, field, frozen

import jdcore.hooks
from tests.environments import clean_environment, install, make_environment

GUIDE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"

pytestmark = [pytest.mark.slow, pytest.mark.artefacts]

# A block may follow a line that is nothing but the name of a file.
_BLOCK = re.compile(r"(?:^`([^`\s]+)`\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@frozen
class Block:
    """One block of code: its language, its text, and the file it is the content of, if any."""

    language: str
    text: str
    file: str | None


def blocks() -> list[Block]:
    found = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    return [Block(language, text, file or None) for file, language, text in found]


@define
class Reader:
    """Somebody who does what the guide says."""

    folder: Path
    python: Path
    printed: str = ""
    installed: list[Path] = field(factory=list)
    stale: bool = False

    def follow(self, block: Block) -> None:
        if block.file is not None:
            self._write(block)
        elif block.language == "sh":
            for line in block.text.splitlines():
                self._type(line)
        elif block.language == "python":
            self._reinstall()
            self.printed = self._run([self.python, "-c", block.text])
        else:
            assert block.language == "text"
            assert self.printed == block.text

    def _write(self, block: Block) -> None:
        path = self.folder / str(block.file)
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        self.stale = True

    def _type(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] == "cd":
            self.folder = (self.folder / words[1]).resolve()
        elif words[:2] == ["pip", "install"]:
            # Not in place: that takes one more package, and only spares what _reinstall() does.
            if words[-1] == ".":
                self.installed.append(self.folder)
                self.stale = True
        else:
            self._reinstall()
            self.printed = self._run(["bash", "-c", line])

    def _reinstall(self) -> None:
        if self.stale:
            install(self.python, *self.installed)
        self.stale = False

    def _run(self, command: list[str | Path]) -> str:
        path = f"{self.python.parent}:/usr/bin:/bin"
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=clean_environment(PATH=path),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


def test_a_reader_who_follows_the_guide_gets_what_it_shows(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    _provide_commands(python)
    reader = Reader(tmp_path, python)
    for block in blocks():
        reader.follow(block)

    assert [path.name for path in reader.installed] == ["my-methods", "fair-methods", "my-methods"]
    assert list((tmp_path / "my-methods" / "dist").glob("*.whl"))


def _provide_commands(python: Path) -> None:
    """Commands of packages that the environment sees, but that are installed elsewhere."""
    for name, call in _commands():
        script = python.parent / name
        script.write_text(f"#!{python}\n{call}\n", encoding="utf-8")
        script.chmod(0o755)


def _commands() -> Iterator[tuple[str, str]]:
    yield "jdcore", "from jdcore.cli import main; raise SystemExit(main())"
    yield "pytest", "import pytest; raise SystemExit(pytest.console_main())"


def test_the_first_plugin_has_fifteen_lines_of_python() -> None:
    first = [block for block in blocks() if block.file and block.file.endswith(".py")][:2]
    lines = [line for block in first for line in block.text.splitlines() if line.strip()]

    assert len(lines) == 15


def test_every_block_is_of_a_kind_that_is_run() -> None:
    kinds = {block.language for block in blocks() if block.file is None}

    assert kinds == {"sh", "python", "text"}
    assert GUIDE.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks())


def test_the_guide_shows_every_hook_at_work() -> None:
    hooks = [name for name in vars(jdcore.hooks) if name.startswith("jdcore_")]
    code = "".join(block.text for block in blocks())

    assert {"jdcore_aggregators", "jdcore_solvers", "jdcore_gramian_rules"} <= set(hooks)
    assert all(f"@hookimpl\ndef {hook}(" in code for hook in hooks)
