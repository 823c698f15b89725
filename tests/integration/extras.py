"""Which modules of jdcore can be imported here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

# Distributions that modules below a name need beyond those of the core.
_NEEDS = {
    "jdcore.bench.": ("matplotlib", "rich", "scikit-learn", "scipy"),
    "jdcore.demo.": ("matplotlib", "rich", "scikit-learn"),
    "jdcore.monitor.lightning": ("lightning",),
    "jdcore.monitor.plots": ("matplotlib",),
}


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def missing(module: str) -> list[str]:
    """The distributions that a module needs and that are not installed."""
    needs = {d for name, group in _NEEDS.items() if module.startswith(name) for d in group}
    return sorted(distribution for distribution in needs if not _installed(distribution))


def needs_more(module: str) -> bool:
    """Whether a module needs distributions that are not installed."""
    return bool(missing(module))


def skipping(modules: list[str]) -> list[Any]:
    """The modules as test parameters; those that cannot be imported skip and say why."""
    return [
        pytest.param(
            module,
            marks=[pytest.mark.skip(reason=f"needs {', '.join(lacking)}")] if lacking else [],
        )
        for module, lacking in ((module, missing(module)) for module in modules)
    ]
