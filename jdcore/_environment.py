"""Switches in the environment (docs/environment.md)."""

from __future__ import annotations

import os

_OFF = frozenset({"", "0", "false", "no", "off"})


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set to what says neither zero nor no."""
    return os.environ.get(variable, "").lower() not in _OFF
