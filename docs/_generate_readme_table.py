"""
Write the table of methods into the READMEs: ``python docs/_generate_readme_table.py``.

The table comes from the specs of the installed plugins and stands between two markers. A test
fails when it is stale.
"""

from __future__ import annotations

import re
from pathlib import Path

from jdcore import AggregatorSpec, describe, list_plugins

ROOT = Path(__file__).resolve().parent.parent
STANDARD, ROBUST = "jdplugins-standard", "jdplugins-robust"
READMES = {  # and the distribution whose methods each of them lists
    "README.md": STANDARD,
    f"jdplugins/{STANDARD}/README.md": STANDARD,
    f"jdplugins/{ROBUST}/README.md": ROBUST,
}

_BEGIN = "<!-- table of methods, made by docs/_generate_readme_table.py -->"
_END = "<!-- end of table -->"


def table(distribution: str) -> str:
    """The table of the methods of a distribution in Markdown, without the markers."""
    names = [
        spec.name
        for plugin in list_plugins()
        if plugin.distribution == distribution
        for spec in plugin.aggregators
    ]
    head = ["| name | class | update | from |", "|---|---|---|---|"]
    return "\n".join([*head, *(_row(describe(f"{distribution}:{name}")) for name in sorted(names))])


def _row(spec: AggregatorSpec) -> str:
    reference = spec.reference
    source = "" if reference is None else f"[{reference.title}]({reference.url}), {reference.year}"
    return f"| `{spec.name}` | `{spec.class_name}` | {spec.summary} | {source} |"


def with_table(text: str, distribution: str) -> str:
    """A text with the table between the markers brought up to date."""
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    updated, count = pattern.subn(lambda _: f"{_BEGIN}\n{table(distribution)}\n{_END}", text)
    if count != 1:
        raise ValueError(f"expected the markers once, found them {count} times")
    return updated


def main() -> None:
    """Bring all READMEs up to date."""
    for readme, distribution in READMES.items():
        text = (ROOT / readme).read_text(encoding="utf-8")
        (ROOT / readme).write_text(with_table(text, distribution), encoding="utf-8")


if __name__ == "__main__":
    main()
