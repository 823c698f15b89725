"""
Closed forms of the Jacobian, one module per kind of layer.

Each satisfies :class:`~jdcore.protocols.GramianRule`. The registry finds them by the type of the
layer, like those of plugins.
"""
