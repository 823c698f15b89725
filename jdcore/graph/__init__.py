"""
Reading the autograd graph.

Here is the only place that reads what torch does not promise to show. It knows no method, no module
and no ``.grad``.
"""

from jdcore.graph._nesting import OuterPass
from jdcore.graph._saved import MATRIX_PRODUCTS, Unreadable, saved, saved_as_it_is
from jdcore.graph._walk import Edge, Reach, edge_of, largest_gradient, reach

__all__ = [
    "MATRIX_PRODUCTS",
    "Edge",
    "OuterPass",
    "Reach",
    "Unreadable",
    "edge_of",
    "largest_gradient",
    "reach",
    "saved",
    "saved_as_it_is",
]
