"""Aggregation that withstands adversarial or broken rows, and what prepares rows for it."""

from jdcore.exports import exports_of

__getattr__, __dir__ = exports_of("jdplugins-robust")
