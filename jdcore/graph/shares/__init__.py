"""Shares of the Jacobian, in the forms that operations give them, and the sum of their Gramians."""

from jdcore.graph.shares._geometry import Geometry
from jdcore.graph.shares._outer import OneHot, Outer, Uses
from jdcore.graph.shares._patches import Patches
from jdcore.graph.shares._product import HALVES, combined, outer, product, sum_of, sum_over, widened
from jdcore.graph.shares._share import Accumulator, Dense, Share, Waiting
from jdcore.graph.shares._sums import Sums, as_they_are

__all__ = [
    "HALVES",
    "Accumulator",
    "Dense",
    "Geometry",
    "OneHot",
    "Outer",
    "Patches",
    "Share",
    "Sums",
    "Uses",
    "Waiting",
    "as_they_are",
    "combined",
    "outer",
    "product",
    "sum_of",
    "sum_over",
    "widened",
]
