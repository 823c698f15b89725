"""
Hooks of others on the tensors and operations of a graph, which torch does not show.

A hook may do anything to a gradient: scale it, clip it, bring the samples into another order. It is
heard by a backward pass, but not by who calls operations by themselves or multiplies what they
saved. So it matters to know that there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jdcore.graph._graph import Graph
from jdcore.graph._saved import computed_at, hooks_made, next_computed_at


class _Watch:
    """
    Tells graphs that may have hooks from those that cannot.

    Every hook has a handle, of which torch counts all, and operations are numbered as they are
    computed. When the count has grown since the last look, a hook may be on any graph of that time:
    on all those with an operation older than this look.
    """

    def __init__(self) -> None:
        self._own = self._seen = self._until = 0

    def look(self) -> None:
        """Notice new hooks."""
        made = hooks_made() - self._own
        if made != self._seen:
            self._seen, self._until = made, next_computed_at()

    def may_have_hooks(self, graph: Graph) -> bool:
        """Whether somebody may have put a hook on something in a graph, parameters apart."""
        self.look()
        nodes = [node for i, node in enumerate(graph.nodes) if i not in graph.leaves]
        return any(computed_at(node) < self._until for node in nodes)

    @contextmanager
    def own_hooks(self) -> Iterator[None]:
        """Do not count what is made in a ``with`` block."""
        before = hooks_made()
        try:
            yield
        finally:
            self._own += hooks_made() - before


_WATCH = _Watch()
look, may_have_hooks, own_hooks = _WATCH.look, _WATCH.may_have_hooks, _WATCH.own_hooks
