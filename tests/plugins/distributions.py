"""Tests of distributions that need not be installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest


def needs(distribution: str) -> pytest.MarkDecorator:
    """Skip, and say so, where a distribution is not installed."""
    # Asking for the module instead would be fooled by a folder of its name on the path.
    try:
        missing = not version(distribution)
    except PackageNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"{distribution} is not installed")
