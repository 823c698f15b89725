"""Configuration of the documentation: ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from _methods_page import methods_page  # noqa: E402 - it lies beside this file
from _pictures import draw  # noqa: E402 - as above

project = "jdcore"
author = "The jdcore team"
release = metadata.version("jdcore")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # ships MathJax with the pages, which then need no network
    "myst_parser",
]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"jdcore {release}"
pygments_style = "default"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show the types, docstrings what they mean
autodoc_preserve_defaults = True
autodoc_mock_imports = ["lightning"]  # only the callback for it needs it
myst_heading_anchors = 3


def setup(app: Any) -> None:
    """Write the pages that come from the specs of the installed plugins, and the pictures."""
    generated = HERE / "_generated"
    generated.mkdir(exist_ok=True)
    (generated / "methods.md").write_text(methods_page(), encoding="utf-8")
    draw(generated)
