"""The aggregation methods of the literature, with exact native solvers."""

from jdcore.exports import exports_of

__getattr__, __dir__ = exports_of("jdplugins-standard")
