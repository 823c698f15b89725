from __future__ import annotations

from torch import Tensor

from jdcore.graph._call import call, called_for_rows, reduced
from jdcore.graph._form import Place
from jdcore.graph._graph import Graph
from jdcore.graph._memory import Memory
from jdcore.graph._operations import REARRANGING
from jdcore.graph._passes import Grads
from jdcore.graph._plan import Plan
from jdcore.graph.shares import sum_of


def pull(graph: Graph, plan: Plan, grads: dict[Place, Tensor]) -> dict[int, Tensor]:
    """
    Carry gradients from roots to parameters, through what lies between, and no further.

    Where samples are apart again below (behind a routing of tokens to experts), the backward pass
    went on by itself.

    :param grads: By root, in its dtype or a wider one.
    :returns: Gradient by the node of the leaf, in its dtype.
    """
    arrived, form = dict(grads), graph.form
    allowed = graph.wanted.keys() | set(plan.below)
    below = plan.below if any(node not in graph.wanted for node, _ in grads) else ()
    for node in below:
        results = form.results[node]
        given = [arrived.pop((node, number), None) for number in range(len(results))]
        if all(g is None for g in given):
            continue
        for place, found in zip(form.inputs[node], _passed(graph, node, given), strict=False):
            if found is None or place[0] not in allowed:
                continue
            result = form.result(place)
            # Autograd does the same between nodes: the gradient of a real tensor is real.
            if found.is_complex() and not result.dtype.is_complex:
                found = found.real
            found = reduced(found, result.shape)
            arrived[place] = sum_of([arrived[place], found]) if place in arrived else found
    leaves = ((node, graph.wanted[node], grad) for (node, _), grad in arrived.items())
    return {node: grad.to(leaf.device, leaf.dtype) for node, leaf, grad in leaves}


def _passed(graph: Graph, node: int, given: Grads) -> Grads:
    """The gradients at the operands of an operation, in the dtypes that it gives."""
    form = graph.form
    kind, [child, *others] = form.operations[node], form.inputs[node]
    if kind not in REARRANGING:
        given = [
            None if g is None else g.to(result.dtype)
            for g, result in zip(given, form.results[node], strict=True)
        ]
    elif kind == "ToCopy" and not others and child[0] in graph.leaves:
        # A conversion to half precision (by autocast) and back would cost two kernels for each
        # parameter, and digits. What moves a tensor to another device has this name as well.
        [grad], leaf = given, graph.leaves[child[0]]
        if grad is not None and grad.device == leaf.device and not grad.is_complex():
            return given
    return call(graph.nodes[node], given)


def pull_rows(
    graph: Graph, plan: Plan, rows: dict[Place, Tensor], memory: Memory
) -> dict[int, Tensor]:
    """
    Carry rows from roots to parameters.

    :param rows: Shape [R, ...] each.
    :param memory: How many rows may be carried at once.
    :returns: Rows by the node of the leaf, shape [R, ...] each.
    """
    places, reached = list(rows), list[int]()

    def one(*grads: Tensor) -> tuple[Tensor, ...]:
        given = {p: g.to(graph.form.result(p).dtype) for p, g in zip(places, grads, strict=True)}
        found = pull(graph, plan, given)
        reached[:] = sorted(found)
        return tuple(found[leaf] for leaf in reached)

    passed = {*plan.below, *plan.pulled, *(node for node, _ in places)}
    size = max(result.shape.numel() for node in passed for result in graph.form.results[node])
    parts = memory.pieces(len(rows[places[0]]), size)
    found, _ = called_for_rows(one, lambda a, b: [rows[p][a:b] for p in places], parts)
    return dict(zip(reached, found, strict=True))
