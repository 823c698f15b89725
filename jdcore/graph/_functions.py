"""
Functions of Python whose backward does what torch asks them not to, and does not stop.

Some **write into the gradients** that they are given. Such a tensor may be the gradient at another
operation as well (a sum hands the same one to both of its operands). If that one came first,
autograd is done with the tensor by then; who kept it would go on with other numbers.

Some **treat NaN otherwise than numbers**, and so hide where samples are: they compare gradients,
replace what is not finite or take another branch, as torch's own derivatives do not. So passes of
numbers follow those of NaN: from the second one on, each sample has another factor, by which all
that belongs to it has to grow. The factors are powers of two, which no rounding hides: what a
function mixes shows in the last digit of the smallest entry.

Some **hand out the same buffer** each time, as captured graphs do. What comes next reads it at once
in a backward pass; who keeps it finds the numbers of a later call there.

Some **keep** what the graph does not show, such as the modules that blocks of reversible networks
run once more, which accumulates into the ``.grad`` of their parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from jdcore.graph._graph import Graph, Place
from jdcore.graph._layout import Layout
from jdcore.graph._operations import is_steady
from jdcore.graph._passes import Grads, copies, differentiate
from jdcore.graph._saved import function_of

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
    if set(graph.functions_of_others.values()).issubset(_KNOWN):
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


# -- those that hand out the same buffer -----------------------------------------------------------


def returning_copies(nodes: Iterable[Any]) -> AbstractContextManager[None]:
    """Copy what functions return in passes, for the time of a ``with`` block."""
    # At the function itself, as autograd holds what it returns at the end of a pass until all of it
    # is over, when the function may have run again.
    return own_hooks(node.register_hook(_copied) for node in nodes)


def _copied(found: Grads, _: Grads) -> Grads:
    return copies(found)


# -- those that hide samples -----------------------------------------------------------------------


def hides_samples(
    graph: Graph,
    output: Tensor,
    batch_dim: int,
    layouts: Mapping[Place, Layout],
    reached: Collection[Place],
) -> bool:
    """
    Whether a function of Python does something else with numbers than with NaN.

    :param output: The losses, the only output of the graph.
    :param batch_dim: Their dimension of samples.
    :param layouts: Where NaN showed the samples.
    :param reached: The places that NaN came to.
    """
    form = graph.form
    functions = [
        node
        for node in (form.leading if form.has_functions else ())
        if function_of(graph.nodes[node]) and not is_steady(form.names[node])
    ]
    if not functions:
        return False
    samples = output.shape[batch_dim]
    # One task starts as it will in the pass that counts; of several ones, none cancels another.
    tasks = _random(output.numel() // samples).view(-1, 1).to(output)
    others = output.shape[:batch_dim] + output.shape[batch_dim + 1 :]
    seed = (tasks / tasks[0]).expand(-1, samples).reshape(*others, samples).movedim(-1, batch_dim)
    first = _returned(graph, output, seed, functions)
    apart = {node for node, _ in layouts}
    known: dict[Place, Layout] = {}
    for (node, operand), grad in first.items():
        place = form.inputs[node][operand]
        if place in layouts:
            known[node, operand] = layouts[place]
            continue
        inside = place[0] in form.leading and place[0] not in form.rearranged
        # Where samples are not apart, what is zero for all together may not be so for one.
        if inside and place not in reached and (node not in apart or bool(grad.any())):
            return True
    # In half precision, factors that are far apart leave the range of numbers.
    half = form.precision == torch.float16
    doubtful = False
    for factors in [_random(samples)] if half else _powers(samples):
        of_losses = factors.view(-1, *[1] * (output.ndim - batch_dim - 1)).to(output)
        second = _returned(graph, output, seed * of_losses, functions)
        if second.keys() != first.keys():
            return True
        for place, layout in known.items():
            wrong, largest = _errors(first[place], second[place], layout, factors)
            # What is not finite cannot be told.
            if bool((wrong > torch.finfo(second[place].dtype).eps ** 0.5 * largest).any()):
                return True
            # The smallest numbers have fewer digits, which a factor brings back.
            limits = torch.finfo(form.precision)
            doubtful |= not half and bool((wrong > limits.tiny / limits.eps).any())
    # Accelerators have operations that add in no fixed order: their last digits differ as well.
    return doubtful and _equal(first, _returned(graph, output, seed, functions))


def _random(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") + 0.5


def _powers(samples: int) -> Iterator[Tensor]:
    """Powers of two for each sample, for as many passes as no two samples have the same in all."""
    numbers = torch.arange(samples, device="cpu")
    while True:
        yield torch.exp2((numbers % 8).double() - 3)
        numbers = numbers // 8
        if not numbers.any():
            return


def _returned(
    graph: Graph, output: Tensor, seed: Tensor, functions: Collection[int]
) -> dict[Place, Tensor]:
    """The gradients that functions return in a pass, by function and operand."""
    kept: dict[Place, Tensor] = {}

    def keep(node: int, found: Grads, _: Grads) -> None:
        for operand, grad in enumerate(found):
            if grad is not None and not grad.is_nested:
                kept[node, operand] = grad.detach().to_dense().clone()

    hooks = (graph.nodes[node].register_hook(partial(keep, node)) for node in functions)
    with own_hooks(hooks):
        differentiate([output], graph.edges(graph.form.targets), [seed], True)
    return kept


def _errors(grad: Tensor, grown: Tensor, layout: Layout, factors: Tensor) -> tuple[Tensor, Tensor]:
    """
    What is missing for a gradient to have grown as it has to, and the largest entry of each sample.

    What belongs to a sample has to grow by its factor, and what belongs to none to be zero.
    """
    owners = layout.owners(grad.shape[layout.dim], grad.device)
    of_entries = torch.where(owners < 0, 0.0, factors.to(grad.device)[owners])
    wrong = (grown - grad * of_entries.view(-1, *[1] * (grad.ndim - layout.dim - 1))).abs()
    others = [d for d in range(grad.ndim) if d != layout.dim]
    largest = grown.abs()
    if others:  # of no dimensions, torch takes all
        largest = largest.amax(others, keepdim=True)
    return wrong, largest


def _equal(found: Mapping[Place, Tensor], again: Mapping[Place, Tensor]) -> bool:
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    return found.keys() == again.keys() and all(same(found[p], again[p]) for p in found)


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
        _collect(vars(node), found, seen, _DEPTH)
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
