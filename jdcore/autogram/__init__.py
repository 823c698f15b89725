"""
Jacobian descent at the price of gradient descent.

:class:`Engine` and the functions compute the Gramian of the Jacobian of any tensor of losses from
the autograd graph, without ever forming the Jacobian. :class:`Site`, the shares and :class:`NoRule`
are what rules for further operations are written with: see :class:`GramianRule`.
"""

from jdcore.autogram._engine import Engine
from jdcore.autogram._functions import backward, gramian
from jdcore.autogram._report import Check, Verification
from jdcore.graph import Dense, GramianRule, Layout, NoRule, OneHot, Outer, Patches, Share, Site

__all__ = [
    "Check",
    "Dense",
    "Engine",
    "GramianRule",
    "Layout",
    "NoRule",
    "OneHot",
    "Outer",
    "Patches",
    "Share",
    "Site",
    "Verification",
    "backward",
    "gramian",
]
