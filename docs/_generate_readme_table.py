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
READMES = (ROOT / "README.md", ROOT / "jdplugins" / "jdplugins-standard" / "README.md")

_BEGIN = "<!-- table of methods, made by docs/_generate_readme_table.py -->"
_END = "<!-- end of table -->"
_DISTRIBUTION = "jdplugins-standard"


def table() -> str:
    """The table in Markdown, without the markers."""
    names = [
        spec.name
        for plugin in list_plugins()
        if plugin.distribution == _DISTRIBUTION
        for spec in plugin.aggregators
    ]
    head = ["| name | class | update | from |", "|---|---|---|---|"]
    return "\n".join(
        [*head, *(_row(describe(f"{_DISTRIBUTION}:{name}")) for name in sorted(names))]
    )


def _row(spec: AggregatorSpec) -> str:
    reference = spec.reference
    source = "" if reference is None else f"[{reference.title}]({reference.url}), {reference.year}"
    return f"| `{spec.name}` | `{spec.class_name}` | {spec.summary} | {source} |"


def with_table(text: str) -> str:
    """A text with the table between the markers brought up to date."""
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    updated, count = pattern.subn(lambda _: f"{_BEGIN}\n{table()}\n{_END}", text)
    if count != 1:
        raise ValueError(f"expected the markers once, found them {count} times")
    return updated


def main() -> None:
    """Bring all READMEs up to date."""
    for readme in READMES:
        readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
