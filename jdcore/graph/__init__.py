"""
Reading the autograd graph: what lies behind losses, where the samples are, and the Jacobian.

It knows no method, and leaves every ``.grad`` as it is.
"""

from jdcore.graph._batched import (
    agree,
    batched_gradients,
    is_known_to_be_left,
    mixed,
    note_left,
    some_are_batched_now,
)
from jdcore.graph._call import call, called_shares
from jdcore.graph._cancelling import multiplied, products_of
from jdcore.graph._form import Place
from jdcore.graph._graph import Graph
from jdcore.graph._hooks import (
    has_hook_for_several,
    hooks_anywhere,
    hooks_made_lately,
    ignore_hooks,
    is_ignored,
    node_has_hooks,
)
from jdcore.graph._jacobian import Jacobian
from jdcore.graph._kept import kept_leaves
from jdcore.graph._layout import Layout
from jdcore.graph._memory import Memory, free_memory
from jdcore.graph._nesting import Exit, OuterPass, leaving
from jdcore.graph._objectives import Objectives
from jdcore.graph._operations import (
    EMBEDDING,
    MATRIX_PRODUCTS,
    is_listed,
    is_sparse,
    note_handing_on,
    some_batched_wrongly,
)
from jdcore.graph._passes import SinglePassesExplained, differentiate
from jdcore.graph._plan import Plans
from jdcore.graph._retained import retains_gradients
from jdcore.graph._root_shares import Served
from jdcore.graph._saved import (
    Unreadable,
    function_of,
    is_batched,
    saved,
    saved_as_it_is,
)
from jdcore.graph._site import NoRule, Site
from jdcore.graph._walk import REENTRANT, Edge, Reach, edge_of, largest_gradient, reach, united
from jdcore.graph.rules import RULES, GramianRule, Rule, Rules
from jdcore.graph.shares import Accumulator, Addend, Dense, OneHot, Outer, Patches, Share

__all__ = [
    "EMBEDDING",
    "MATRIX_PRODUCTS",
    "REENTRANT",
    "RULES",
    "Accumulator",
    "Addend",
    "Dense",
    "Edge",
    "Exit",
    "GramianRule",
    "Graph",
    "Jacobian",
    "Layout",
    "Memory",
    "NoRule",
    "Objectives",
    "OneHot",
    "Outer",
    "OuterPass",
    "Patches",
    "Place",
    "Plans",
    "Reach",
    "Rule",
    "Rules",
    "Served",
    "Share",
    "SinglePassesExplained",
    "Site",
    "Unreadable",
    "agree",
    "batched_gradients",
    "call",
    "called_shares",
    "differentiate",
    "edge_of",
    "free_memory",
    "function_of",
    "has_hook_for_several",
    "hooks_anywhere",
    "hooks_made_lately",
    "ignore_hooks",
    "is_batched",
    "is_ignored",
    "is_known_to_be_left",
    "is_listed",
    "is_sparse",
    "kept_leaves",
    "largest_gradient",
    "leaving",
    "mixed",
    "multiplied",
    "node_has_hooks",
    "note_handing_on",
    "note_left",
    "products_of",
    "reach",
    "retains_gradients",
    "saved",
    "saved_as_it_is",
    "some_are_batched_now",
    "some_batched_wrongly",
    "united",
]
