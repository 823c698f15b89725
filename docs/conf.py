"""Configuration of the documentation: ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from _methods_page import methods_page  # noqa: E402 - it lies beside this file

project = "jdcore"
author = "The jdcore team"
release = metadata.version("jdcore")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"jdcore {release}"
pygments_style = "default"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show the types, docstrings what they mean
autodoc_preserve_defaults = True
myst_heading_anchors = 3


def setup(app: Any) -> None:
    """Write the pages that come from the specs of the installed plugins."""
    generated = HERE / "_generated"
    generated.mkdir(exist_ok=True)
    (generated / "methods.md").write_text(methods_page(), encoding="utf-8")
