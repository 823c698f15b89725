"""
Closed forms for operations of torch, by the names of their nodes.

An operation without one is served as well: it is called once for each sample.
"""

from jdcore.graph.rules import _arithmetic, _convolution, _look_ups, _norms, _recurrent
from jdcore.graph.rules._table import FOR_LAYERS, RULES, GramianRule, Rule, Rules

__all__ = ["FOR_LAYERS", "RULES", "GramianRule", "Rule", "Rules"]

del _arithmetic, _convolution, _look_ups, _norms, _recurrent
