"""Factored forms of columns of the Jacobian: what the rules of layers yield."""

from jdcore.autogram.blocks._block import Block, Gradients
from jdcore.autogram.blocks._outer import OuterBlock
from jdcore.autogram.blocks._patches import PatchBlock
from jdcore.autogram.blocks._rows import RowsBlock
from jdcore.autogram.blocks._scatter import ScatterBlock
from jdcore.autogram.blocks._sum import combined

__all__ = [
    "Block",
    "Gradients",
    "OuterBlock",
    "PatchBlock",
    "RowsBlock",
    "ScatterBlock",
    "combined",
]
