"""
Reading the autograd graph: what lies behind losses, where the samples are, and the Jacobian.

It knows no method, and leaves every ``.grad`` as it is. A step of autogram goes through it so:

1. ``_objectives``: the losses are K tasks by B samples.
2. ``_graph``: one walk numbers the nodes behind them. What the graphs of all steps have in common
   is their form. (``_walk`` is the shorter walk that autojac makes do with.)
3. ``_jacobian`` conducts all that follows. First it asks for what torch does not show: hooks of
   others (``_hooks``), tensors that retain their gradient (``_retained``), functions of others that
   do what torch asks them not to (``_functions``). Such graphs get a pass for each loss.
4. ``_plan``: once for each kind of graph, it finds the frontier: the operations that keep samples
   apart, and those of their operands, the roots, that belong to no sample. Where samples are
   (``_layout``) is shown by NaN (``_probe``). ``_operations`` is the table of all that is known of
   operations of torch.
5. ``_passes`` makes the backward pass and listens at the frontier, not to passes inside of this one
   (``_nesting``). ``_tasks`` makes the passes of several tasks, in one by vmap (``_batched``) where
   that is faster.
6. ``_serving`` makes a share of each gradient that arrives, by one of the ``rules``, to which a
   ``_site`` shows the operation. Without a rule, the operation is called (``_call``). ``_saved``
   reads what operations saved, under names of torch that are private.
7. ``_root_shares`` adds up the Gramians of the ``shares``, those of biases and norms together.
   Rows of what is computed from parameters are pulled back to these (``_call``). ``_cost`` chooses
   among the forms of a Gramian and ``_memory`` the size of temporaries; ``_cancelling`` has
   products made once more in float64 where those of float32 are too coarse.
8. The weighted gradients come from the same shares.

Other rooms import from its modules what they alone need.
"""

from jdcore.graph._graph import Graph, Place, Walk
from jdcore.graph._jacobian import Jacobian
from jdcore.graph._layout import Layout
from jdcore.graph._objectives import Objectives
from jdcore.graph._plan import Plans
from jdcore.graph._site import NoRule, Site
from jdcore.graph._walk import Reach, edge_of, reach
from jdcore.graph.rules import RULES, GramianRule, Rule, Rules
from jdcore.graph.shares import Accumulator, Dense, OneHot, Outer, Patches, Share

__all__ = [
    "RULES",
    "Accumulator",
    "Dense",
    "GramianRule",
    "Graph",
    "Jacobian",
    "Layout",
    "NoRule",
    "Objectives",
    "OneHot",
    "Outer",
    "Patches",
    "Place",
    "Plans",
    "Reach",
    "Rule",
    "Rules",
    "Share",
    "Site",
    "Walk",
    "edge_of",
    "reach",
]
