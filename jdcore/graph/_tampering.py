"""
Functions of Python that write into the gradients that their backward is given.

Torch asks them not to, but does not stop them. Such a tensor may be the gradient at another
operation as well (a sum hands the same one to both of its operands). If that one came first,
autograd is done with the tensor by then; who kept it would go on with other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jdcore._handles import own_hooks
from jdcore.errors import UnservedGraphError
from jdcore.graph._graph import Graph
from jdcore.graph._passes import differentiate

# By function, whether it was seen to do so when it ran.
_KNOWN: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def tampers(graph: Graph) -> bool:
    """Whether a function of a graph is known to write into its gradients."""
    return any(map(_KNOWN.get, graph.functions_of_others.values()))


def try_functions(graph: Graph, outputs: Sequence[Tensor]) -> None:
    """
    Get to know the functions of a graph that have not run yet, by one more pass.

    :param outputs: Where the graph starts.
    """
    if set(graph.functions_of_others.values()).issubset(_KNOWN):
        return
    live = [output for output in outputs if output.requires_grad]
    edges = [graph.edge(place) for place in graph.form.targets]
    with _watched(graph):
        differentiate(live, edges, [torch.ones_like(output) for output in live], True)


@contextmanager
def refused_tampering(graph: Graph) -> Iterator[None]:
    """
    Refuse passes in which a function writes into its gradients that did not do so before.

    :raises UnservedGraphError: At the end of the ``with`` block.
    """
    with _watched(graph) as guilty:
        yield
    if guilty:
        raise UnservedGraphError(
            f"{guilty[0].__name__}, whose backward writes into the gradient that it is given",
            "another operation may have the same one, and the function did not do so before",
            "Let it write into a clone, or make this step once more: from now on, such graphs get "
            "a pass for each loss.",
        )


@contextmanager
def _watched(graph: Graph) -> Iterator[list[type]]:
    """Notice those functions that write into their gradients, for the time of a ``with`` block."""
    given: dict[Any, list[tuple[Tensor, int]]] = {}
    guilty: list[type] = []

    def before(node: Any, grads: Sequence[Tensor | None]) -> None:
        # Held until afterwards, since tensors know how often they were written to.
        given[node] = [(grad, grad._version) for grad in grads if grad is not None]

    def after(node: Any, function: type, *_: object) -> None:
        changed = any(grad._version != version for grad, version in given.pop(node, ()))
        _KNOWN[function] = changed or _KNOWN.get(function, False)
        if changed:
            guilty.append(function)

    def hooks() -> Iterator[RemovableHandle]:
        for node, function in graph.functions_of_others.items():
            yield node.register_prehook(partial(before, node))
            yield node.register_hook(partial(after, node, function))

    with own_hooks(hooks()):
        yield guilty
