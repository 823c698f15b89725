"""
Which distribution provides which name, for the error message when it is not installed.

Data for messages only: nothing is looked up or loaded through this table, and a test keeps it equal
to what the distributions of this repository provide.
"""

from __future__ import annotations

from jdcore.spec import normalize_name

METHODS = {
    "jdplugins-standard": ("constant", "mean", "random", "sum", "upgrad"),
}


def distribution_of(name: str) -> str | None:
    """Name of the distribution known to provide this method, in any spelling."""
    key = normalize_name(name)
    for distribution, names in METHODS.items():
        if key in map(normalize_name, names):
            return distribution
    return None
