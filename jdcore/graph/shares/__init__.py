"""Shares of the Jacobian, in the forms that operations give them, and the sum of their Gramians."""

from jdcore.graph.shares._outer import OneHot, Outer, OuterBeside, OuterLayers, beside, joined
from jdcore.graph.shares._patches import Geometry, Patches
from jdcore.graph.shares._product import combined, outer, product, sum_of, sum_over, widened
from jdcore.graph.shares._share import Accumulator, Addend, Dense, Share, ShortRows, SingleRows

__all__ = [
    "Accumulator",
    "Addend",
    "Dense",
    "Geometry",
    "OneHot",
    "Outer",
    "OuterBeside",
    "OuterLayers",
    "Patches",
    "Share",
    "ShortRows",
    "SingleRows",
    "beside",
    "combined",
    "joined",
    "outer",
    "product",
    "sum_of",
    "sum_over",
    "widened",
]
