"""
One backward pass that hands each gradient on as soon as it is complete.

What receives it can finish with it there and then, so that the gradients of a deep model need not
be in memory all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.autogram._passes import Objectives, gradients
from jdcore.autogram.rules._direct import Place

Receive = Callable[[Place, Tensor], None]


def stream(
    objectives: Objectives,
    places: Iterable[Place],
    children: Mapping[Node, Sequence[Node]],
    receive: Receive,
    retain_graph: bool,
) -> None:
    """
    Gradients of the sum of the losses.

    :param places: Where to take them.
    :param children: The graph.
    :param receive: Called once with each place that has a gradient. May raise.
    """
    outputs: dict[Node, list[int]] = {}
    for node, output in places:
        outputs.setdefault(node, []).append(output)
    # Autograd does not run the deepest nodes, and so no hook of theirs; it returns their gradients.
    deepest = _deepest(objectives.output.grad_fn, children, outputs)
    ends = [(node, output) for node in deepest for output in outputs[node]]
    handles = [
        node.register_prehook(partial(_hand_on, node, numbers, receive))
        for node, numbers in outputs.items()
        if node not in deepest
    ]
    try:
        edges = [GradientEdge(*end) for end in ends]
        found = gradients(objectives, edges, None, retain_graph)
    finally:
        for handle in handles:
            handle.remove()
    for end in ends:
        gradient = found.pop(0)
        if gradient is not None:
            receive(end, gradient)


def _hand_on(
    node: Node, numbers: Sequence[int], receive: Receive, grads: tuple[Tensor | None, ...]
) -> None:
    for number in numbers:
        gradient = grads[number]
        if gradient is not None:
            receive((node, number), gradient)


def _deepest(
    root: Any, children: Mapping[Node, Sequence[Node]], wanted: Iterable[Node]
) -> list[Node]:
    """Those of the wanted nodes from which no other one can be reached."""
    above: dict[Node, bool] = {}  # whether a wanted node can be reached
    stack: list[Node] = [root]
    while stack:
        node = stack[-1]
        if node not in above:
            above[node] = False
            stack += [child for child in children[node] if child not in above]
            continue
        stack.pop()
        above[node] = any(child in wanted or above[child] for child in children[node])
    return [node for node in wanted if not above[node]]
