"""
Functions of Python or C++ whose backward does what torch asks them not to, and does not stop.

Some **write into the gradients** that they are given. Such a tensor may be the gradient at another
operation as well (a sum hands the same one to both of its operands). If that one came first,
autograd is done with the tensor by then; who kept it would go on with other numbers.

Some **hand out the same buffer** each time, as captured graphs do. What comes next reads it at once
in a backward pass; who keeps it finds the numbers of a later call there.

Some **keep** what the graph does not show, such as the modules that blocks of reversible networks
run once more, which accumulates into the ``.grad`` of their parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from jdcore._handles import own_hooks
from jdcore.errors import UnservedGraphError
from jdcore.graph._graph import Graph
from jdcore.graph._passes import Grads, copies, differentiate

# -- those that write into gradients ---------------------------------------------------------------

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
    if not [f for f in graph.functions_of_others.values() if f not in _KNOWN]:
        return
    live = [output for output in outputs if output.requires_grad]
    edges = graph.edges(graph.form.targets)
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
        name = graph.functions_of_others[guilty[0]].__name__
        raise UnservedGraphError(
            f"{name}, whose backward writes into the gradient that it is given",
            "another operation may have the same one, and the function did not do so before",
            "Let it write into a clone, or make this step once more: from now on, such graphs get "
            "a pass for each loss.",
        ).at(graph.belonging_to(guilty[0]))


@contextmanager
def _watched(graph: Graph) -> Iterator[list[Any]]:
    """Notice those functions that write into their gradients, for the time of a ``with`` block."""
    given: dict[Any, list[tuple[Tensor, int]]] = {}
    guilty: list[Any] = []

    def before(node: Any, grads: Sequence[Tensor | None]) -> None:
        # Held until afterwards, since tensors know how often they were written to.
        given[node] = [(grad, grad._version) for grad in grads if grad is not None]

    def after(node: Any, function: type, *_: object) -> None:
        changed = any(grad._version != version for grad, version in given.pop(node, ()))
        _KNOWN[function] = changed or _KNOWN.get(function, False)
        if changed:
            guilty.append(node)

    def hooks() -> Iterator[RemovableHandle]:
        for node, function in graph.functions_of_others.items():
            yield node.register_prehook(partial(before, node))
            yield node.register_hook(partial(after, node, function))

    with own_hooks(hooks()):
        yield guilty


# -- those that hand out the same buffer -----------------------------------------------------------


def returning_copies(nodes: Iterable[Any]) -> AbstractContextManager[None]:
    """Copy what functions return in passes, for the time of a ``with`` block."""
    # At the function itself, as autograd holds what it returns at the end of a pass until all of it
    # is over, when the function may have run again.
    return own_hooks(node.register_hook(_copied) for node in nodes)


def _copied(found: Grads, _: Grads) -> Grads:
    return copies(found)


# -- those that keep what the graph does not show --------------------------------------------------

# How deep attributes, containers and closures are searched for modules.
_DEPTH = 5


def kept_leaves(functions: Iterable[Any]) -> list[Tensor]:
    """
    Leaves that custom functions keep in attributes of their context, there or inside of modules.

    They may accumulate into the ``.grad`` of these.

    :param functions: Their nodes. Torch's own operations have all of their operands as edges.
    """
    found: dict[Tensor, None] = {}
    seen: set[int] = set()
    for node in functions:
        # The node of a custom function is the `ctx` of its forward, with all that was set there.
        _collect(getattr(node, "__dict__", None), found, seen, _DEPTH)
    return list(found)


def _collect(value: Any, found: dict[Tensor, None], seen: set[int], depth: int) -> None:
    # Contexts may refer to themselves, and to whatever else the user keeps there: a whole trainer,
    # say.
    if id(value) in seen or depth < 0:
        return
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            found[value] = None
        return
    seen.add(id(value))
    for part in _parts(value):
        _collect(part, found, seen, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):
        return value.parameters()
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    # Reversible blocks often keep the forward of their halves as a bound method, a partial or a
    # closure.
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises for a variable that is not assigned yet
    except ValueError:
        return False
    return True
