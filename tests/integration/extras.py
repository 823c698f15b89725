"""Which modules of jdcore can be imported here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


DEMO = all(map(_installed, ("scikit-learn", "matplotlib", "rich")))


def needs_more(module: str) -> bool:
    """Whether a module needs an extra that is not installed."""
    return module.startswith("jdcore.demo.") and not DEMO


def skipping(modules: list[str]) -> list[Any]:
    """The modules as test parameters; those that cannot be imported skip and say why."""
    mark = pytest.mark.skip(reason="needs the extra jdcore[demo]")
    return [pytest.param(m, marks=[mark] if needs_more(m) else []) for m in modules]
