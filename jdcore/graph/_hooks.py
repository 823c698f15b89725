"""
Hooks of others on the tensors and operations of a graph, which torch does not show.

A hook may do anything to a gradient: scale it, clip it, bring the samples into another order. It is
heard by a backward pass, but not by who calls operations by themselves or multiplies what they
saved. So it matters to know that there is none.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from jdcore._accumulators import accumulator_hooks
from jdcore._handles import hooks_made, hooks_of, is_own
from jdcore._living import living
from jdcore.graph._graph import Graph
from jdcore.graph._saved import next_computed_at, some_computed_before


class _Watch(threading.local):
    """
    Tells graphs that may have hooks from those that cannot.

    Every hook has a handle, of which torch counts all, and operations are numbered as they are
    computed. When the count has grown since the last look, a hook may be on any graph of that time:
    on all those with an operation older than this look. Most often it is elsewhere, on a module or
    an optimizer, which a look at all hooks there are can tell; it takes tens of milliseconds.

    Each thread has its own, since each numbers the operations that it computes by itself.
    """

    _seen = _until = _harmless = 0
    """Hooks at the last look, the operations before it, and hooks of which none was on a graph."""

    def look(self) -> None:
        """Notice new hooks."""
        made = hooks_made()
        if made != self._seen:
            self._seen, self._until = made, next_computed_at()

    def may_have_hooks(self, graph: Graph) -> bool:
        """Whether somebody may have put a hook on something in a graph, parameters apart."""
        nodes = [node for i, node in enumerate(graph.nodes) if i not in graph.leaves]
        # Where none of so many hooks was on a tensor of any graph, none is until there are more.
        if not self.made_lately(nodes) or (made := hooks_made()) == self._harmless:
            return False
        found = hooks_anywhere(graph.leaves.values())
        if not found:
            self._harmless = made
        return found

    def made_lately(self, nodes: Iterable[Any]) -> bool:
        """
        Whether somebody made a hook, be it anywhere, since one of some operations ran.

        Of operations of another thread nothing is known, and it may be so.
        """
        self.look()
        return some_computed_before(nodes, self._until)


def hooks_anywhere(leaves: Iterable[Tensor]) -> bool:
    """Whether there are hooks that neither modules and optimizers have, nor some leaves."""
    # All kinds of hooks lie in such dictionaries, by the number of their handle. They are copied,
    # since another thread may add a hook meanwhile.
    dictionaries = [d for d in living(OrderedDict) if type(d) is OrderedDict and _by_number(d)]
    found = {id(d): d for d in dictionaries if any(starmap(_matters, list(d.items())))}
    leaves = list(leaves)
    for leaf in leaves:
        found.pop(id(leaf._post_accumulate_grad_hooks), None)
    # These run where gradients are written, whatever has made them.
    for behind in accumulator_hooks(leaves).values():
        found.pop(id(behind.before), None)
        found.pop(id(behind.after), None)
    for owner in gc.get_referrers(*found.values()):
        for hooks in _fields_with_hooks(owner):
            found.pop(id(hooks), None)
    return bool(found)


def node_has_hooks(node: Any) -> bool:
    """Whether somebody put hooks on an operation itself, which run when it is executed."""
    if not hooks_made_lately([node]):
        return False
    return any(hooks_of(node))


# What torch registers with each tensor of a hook for several, by mode. It bears the name of the
# user's function where that is called for the first gradient; its code does not.
_OF_SEVERAL = {"all": "inner_hook", "any": "wrapped_fn"}


def has_hook_for_several(tensor: Tensor, mode: str) -> bool:
    """Whether a tensor has a hook of ``register_multi_grad_hook``, which works in passes only."""
    hooks = tensor._backward_hooks
    if not hooks:
        return False
    codes = [getattr(hook, "__code__", None) for hook in hooks.values()]
    kinds = [(code.co_name, code.co_filename) for code in codes if code is not None]
    return (_OF_SEVERAL[mode], torch.autograd.graph.__file__) in kinds


_HARMLESS: set[str] = set()


def ignore_hooks(name: str) -> None:
    """
    Do not mind hooks that are this function: it hands every gradient on as it is.

    :param name: The qualified name of the function.
    """
    _HARMLESS.add(name)


def is_ignored(hook: object) -> bool:
    """Whether a hook is known to hand gradients on as they are."""
    return getattr(hook, "__qualname__", None) in _HARMLESS


def _matters(number: int, value: object) -> bool:
    # Modules note in such dictionaries, too, how some of their hooks are to be called.
    return callable(value) and not is_ignored(value) and not is_own(number)


def _by_number(hooks: OrderedDict[Any, Any]) -> bool:
    return type(next(reversed(hooks), None)) is int


def _fields_with_hooks(owner: object) -> list[object]:
    """The hooks of a leaf, or those that are fields of an object of Python."""
    if issubclass(type(owner), Tensor):
        assert isinstance(owner, Tensor)
        if not (owner.is_leaf and owner.requires_grad):
            return []
        return [owner._backward_hooks, owner._post_accumulate_grad_hooks]
    fields = owner if type(owner) is dict else getattr(owner, "__dict__", {})
    return [
        value
        for name, value in list(fields.items())
        if isinstance(name, str) and name.endswith("hooks")
    ]


_WATCH = _Watch()
hooks_made_lately = _WATCH.made_lately
look, may_have_hooks = _WATCH.look, _WATCH.may_have_hooks
