"""
Which distribution provides which name, for the error message when it is not installed.

Data for messages only: nothing is looked up or loaded through this table, and a test keeps it equal
to what the distributions of this repository provide.
"""

from __future__ import annotations

from jdcore.spec import normalize_name

METHODS = {
    "jdplugins-standard": (
        "aligned_mtl",
        "config",
        "constant",
        "graddrop",
        "gradvac",
        "imtl_g",
        "krum",
        "mean",
        "nash_mtl",
        "pcgrad",
        "random",
        "sum",
        "trimmed_mean",
        "upgrad",
    ),
}


def distribution_of(name: str) -> str | None:
    """Name of the distribution known to provide this method, in any spelling."""
    key = normalize_name(name)
    for distribution, names in METHODS.items():
        if key in map(normalize_name, names):
            return distribution
    return None
