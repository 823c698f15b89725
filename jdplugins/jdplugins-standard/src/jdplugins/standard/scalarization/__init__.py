"""Scalarizers of the literature: one loss of several, without a Jacobian."""

from jdcore.exports import exports_of

__getattr__, __dir__ = exports_of("jdplugins-standard", "scalarizers")
