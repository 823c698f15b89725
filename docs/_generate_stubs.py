"""
Write what editors and type checkers see of all methods: ``python docs/_generate_stubs.py``.

A test fails when a stub is stale.
"""

from __future__ import annotations

from pathlib import Path

from jdcore._catalogue import METHODS
from jdcore._stubs import stubs_of, stubs_of_core


def stubs() -> dict[Path, str]:
    """The text of every stub of this repository by its path."""
    found = stubs_of_core(sorted(METHODS))
    for distribution in METHODS:
        found |= stubs_of(distribution)
    return found


def main() -> None:
    """Bring all stubs up to date."""
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
