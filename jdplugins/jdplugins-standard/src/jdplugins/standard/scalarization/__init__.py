"""Scalarizers of the literature: one loss of several, without a Jacobian."""
