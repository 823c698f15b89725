"""
Jacobian descent at the price of gradient descent.

:class:`Engine` computes the Gramian of the Jacobian of any tensor of losses layer by layer, without
ever forming the Jacobian. :class:`LayerCall` and the blocks are what rules for further layers are
written with: see :class:`~jdcore.protocols.GramianRule`.
"""

from jdcore.autogram._call import LayerCall
from jdcore.autogram._engine import Engine
from jdcore.autogram.blocks import Block, OuterBlock, PatchBlock, RowsBlock, ScatterBlock

__all__ = [
    "Block",
    "Engine",
    "LayerCall",
    "OuterBlock",
    "PatchBlock",
    "RowsBlock",
    "ScatterBlock",
]
