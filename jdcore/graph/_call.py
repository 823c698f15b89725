"""Operations that are their own derivatives: without a rule, or between roots and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from jdcore._fields import dense
from jdcore.graph._batched import agree, mixed, without_warning
from jdcore.graph._graph import Graph, Place
from jdcore.graph._memory import Memory
from jdcore.graph._operations import REARRANGING, is_batchable
from jdcore.graph._passes import Grads, copies
from jdcore.graph._plan import Plan
from jdcore.graph._saved import function_of, zeros_at
from jdcore.graph._site import Site
from jdcore.graph.shares import Dense, sum_of

# Operations whose derivative cannot be batched, or not without a loop inside.
_ONE_BY_ONE: set[str] = {"MkldnnRnnLayerBackward0", "CudnnRnnBackward0"}


def call(node: Any, grads: Grads) -> tuple[Tensor | None, ...]:
    """
    Make of gradients at the results of an operation those at its operands.

    Not inside of a backward pass, where a node computes only what that pass needs.
    """
    # Nodes of torch's own operations can be called; those of Python functions cannot, and have
    # `apply`, which runs the backward of the user.
    if hasattr(node, "apply"):
        return _applied(node, grads)
    found = node(*grads)
    results = found if isinstance(found, tuple) else (found,)
    return results if function_of(node) is None else tuple(copies(results))


def _applied(function: Any, grads: Grads) -> tuple[Tensor | None, ...]:
    """
    Run the backward of a Python function as autograd does, which does more than run it.

    Missing gradients become zeros, unless the function asked for None; torch does not show whether
    it did, and zeros are as good. Of the gradients of all arguments, those of tensors are kept.
    """
    given = [zeros_at(function, i) if g is None else g for i, g in enumerate(grads)]
    found = function.apply(*given)
    of_arguments = found if isinstance(found, tuple) else (found,)
    # The arguments that need a gradient are the operands that come from somewhere, in order.
    needed = compress(copies(of_arguments), function.needs_input_grad)
    return tuple([None if child is None else next(needed) for child, _ in function.next_functions])


def reduced(grad: Tensor, shape: torch.Size) -> Tensor:
    """What autograd does to the results of a node: nodes leave the sums of broadcasting to it."""
    grad = dense(grad)
    return grad if grad.shape == shape else grad.sum_to_size(shape)


def called_shares(site: Site, operands: Sequence[int], memory: Memory) -> dict[int, Dense]:
    """
    Call an operation once for each row, with the gradients of all other samples set to zero.

    :param operands: Those that shares are wanted for.
    :param memory: How many samples may be called at once: each has gradients of all results.
    :returns: By operand, its share.
    """
    node, shapes = site.node, {p: site.shapes[p] for p in operands}
    # A result without gradients, or on which no loss depends, is nothing to the operation either.
    given = [
        None if g is None or layout is None else (g, layout.masks(g[0]))
        for g, layout in zip(site.grads, site.layouts, strict=True)
    ]
    present = [pair for pair in given if pair is not None]
    tasks, samples = len(present[0][0]), site.samples

    def one(*chosen: Tensor) -> tuple[Tensor, ...]:
        rest: Iterator[Tensor] = iter(chosen)
        found = call(node, [None if pair is None else next(rest) for pair in given])
        return tuple(
            chosen[0].new_zeros(shape) if found[p] is None else reduced(found[p], shape)  # type: ignore[arg-type]  # checked
            for p, shape in shapes.items()
        )

    def rows_of(row: int, end: int) -> list[Tensor]:
        k, b = divmod(row, samples)
        # Chosen, not multiplied: a sample that is NaN concerns no other one.
        return [torch.where(m[b : b + end - row], g[k], 0) for g, m in present]

    size = sum(g[0].numel() for g, _ in present) + sum(shape.numel() for shape in shapes.values())
    parts = [
        (k * samples + start, k * samples + stop)
        for k in range(tasks)
        for start, stop in memory.pieces(samples, size)
    ]
    one_by_one = hasattr(node, "apply") or site.name in _ONE_BY_ONE
    found, batched = called_for_rows(one, rows_of, parts, one_by_one=one_by_one)
    if not batched and not one_by_one:
        _ONE_BY_ONE.add(site.name)
    return {
        p: Dense(of_operand.view(tasks, samples, *shape), shape)
        for of_operand, (p, shape) in zip(found, shapes.items(), strict=True)
    }


def called_for_rows(
    one: Callable[..., tuple[Tensor, ...]],
    rows_of: Callable[[int, int], Sequence[Tensor]],
    parts: Sequence[tuple[int, int]],
    *,
    one_by_one: bool = False,
    known: bool = False,
) -> tuple[Sequence[Tensor], bool]:
    """
    Call a linear function of some tensors for many rows, as many at once as a part has.

    :param rows_of: Gives the rows of a part.
    :param parts: First row and end of each, one after the other.
    :param one_by_one: Whether to call it for each row by itself anyway.
    :param known: Whether it is known to be batched rightly. Else the first part shows it.
    :returns: Its results, shape [R, ...] each, and whether it could be called for several at once.
    """
    batched, results = not one_by_one, list[Tensor]()
    for start, stop in parts:
        rows = rows_of(start, stop)
        found = None
        if batched and stop - start > 1:
            found = _batched(one, rows, check=start == 0 and not known)
            batched = found is not None
        if found is None:
            each = [one(*(of_operand[r] for of_operand in rows)) for r in range(stop - start)]
            found = tuple(torch.stack(of_operand) for of_operand in zip(*each, strict=True))
        if len(parts) == 1:
            return found, batched
        if not results:
            # One tensor that is filled part by part: torch.cat would hold all rows twice for a
            # while.
            results += [of.new_empty(parts[-1][1], *of.shape[1:]) for of in found]
        for whole, of_part in zip(results, found, strict=True):
            whole[start:stop] = of_part
    return results, batched


def _batched(
    one: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], *, check: bool
) -> tuple[Tensor, ...] | None:
    """
    Call a linear function of some tensors for all rows at once.

    :param check: Whether to compare with a call for a combination of all rows.
    :returns: Its results, stacked, or None if one of its operations cannot be batched.
    """
    try:
        with without_warning():
            found: tuple[Tensor, ...] = torch.vmap(one)(*rows)
    # vmap raises it for what it cannot batch, such as Python code that asks for a value.
    except RuntimeError:
        return None
    if check:
        expected = one(*map(mixed, rows))
        if not all(agree([pair]) for pair in zip(found, expected, strict=True)):
            return None
    return found


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
    reached = {node for node, _ in grads if node not in graph.wanted}
    for node in plan.below if reached else ():
        if node not in reached:
            continue
        given = [arrived.pop((node, i), None) for i in range(len(form.results[node]))]
        for place, found in zip(form.inputs[node], _passed(graph, node, given), strict=False):
            if found is None or place[0] not in allowed:
                continue
            result = form.result(place)
            # Autograd does the same between nodes: the gradient of a real tensor is real.
            if found.is_complex() and not result.dtype.is_complex:
                found = found.real
            found = reduced(found, result.shape)
            arrived[place] = sum_of([arrived[place], found]) if place in arrived else found
            reached.add(place[0])
    leaves = [(node, graph.wanted[node], grad) for (node, _), grad in arrived.items()]
    return {
        # Asked first, as a conversion costs as much as a small operation.
        node: grad
        if grad.dtype == leaf.dtype and grad.device == leaf.device
        else grad.to(leaf.device, leaf.dtype)
        for node, leaf, grad in leaves
    }


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
    # Functions of Python may keep the gradients that they are given, which must not be several in
    # one then, unless they say that they can be batched.
    below = {graph.nodes[node] for node in plan.below}
    alone = any(
        node in below and not getattr(function, "generate_vmap_rule", False)
        for node, function in graph.functions_of_others.items()
    )
    found, _ = called_for_rows(
        one,
        lambda a, b: [rows[p][a:b] for p in places],
        parts,
        one_by_one=alone,
        known=all(is_batchable(graph.form.names[n], graph.nodes[n]) for n in plan.below),
    )
    return dict(zip(reached, found, strict=True))
