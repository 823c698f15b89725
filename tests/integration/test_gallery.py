"""Every program of the gallery runs as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
PAGES = sorted(path.stem for path in GALLERY.glob("*.md") if path.stem != "index")


def program(page: str) -> str:
    """The blocks of a page, one after the other, on the lines that they have there."""
    text = (GALLERY / f"{page}.md").read_text(encoding="utf-8")
    lines, code = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if code and not fence else "")
        code = line == "```python" or (code and not fence)
    return "\n".join(lines)


def missing(text: str) -> list[str]:
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    if "monitor import plots" in text:
        imported.add("matplotlib")
    if "transformers" in imported:  # whose Trainer is not made without it
        imported.add("accelerate")
    return sorted(name for name in imported if importlib.util.find_spec(name) is None)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("default:::lightning", "default:::transformers", "default:::accelerate")
def test_the_program_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = program(page)
    assert text.strip(), "a page without a program"
    lacking = missing(text)
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    monkeypatch.chdir(tmp_path)

    exec(compile(text, str(GALLERY / f"{page}.md"), "exec"), {"__name__": "example"})


def test_every_page_is_listed() -> None:
    listed = re.findall(r"^([\w-]+)$", (GALLERY / "index.md").read_text(), re.MULTILINE)

    assert sorted(listed) == PAGES
