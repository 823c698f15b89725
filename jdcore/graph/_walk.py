from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Edge: TypeAlias = "tuple[Node, int]"


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Reach:
    """
    What a differentiation of some outputs passes through.

    :param edges: Every edge of the graph, in a fixed order: node and index of its output.
    :param leaves: Leaf tensors that require grad, in the order in which they were found.
    """

    edges: dict[Edge, None]
    leaves: tuple[Tensor, ...]

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the outputs depend on a tensor that requires grad."""
        return edge_of(tensor) in self.edges

    def reaches_any(self, edges: set[Edge]) -> bool:
        """Whether one of the edges is in the graph."""
        return not edges.isdisjoint(self.edges)

    @cached_property
    def nodes(self) -> set[Node]:
        """The nodes that are executed and may hold saved tensors: all but those of leaves."""
        return {node for node, _ in self.edges if not hasattr(node, "variable")}


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor that requires grad arrives in the graph."""
    if tensor.grad_fn is not None:  # less overhead than the call
        return tensor.grad_fn, tensor.output_nr
    edge: GradientEdge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def reach(outputs: Iterable[Tensor], stop: Iterable[Tensor] = ()) -> Reach:
    """
    What lies behind some tensors, these included.

    :param outputs: Where to start. Tensors that do not require grad have nothing behind them.
    :param stop: Tensors at which to turn back; what lies behind only them is not visited.
    """
    barrier = {edge_of(tensor) for tensor in stop if tensor.requires_grad}
    return _walk([edge_of(tensor) for tensor in outputs if tensor.requires_grad], barrier)


def reach_behind(outputs: Iterable[Tensor]) -> Reach:
    """What lies strictly behind some tensors: what their nodes were computed from."""
    nodes = [edge_of(tensor)[0] for tensor in outputs if tensor.requires_grad]
    return _walk([edge for node in nodes for edge in _next_edges(node)], set())


def _walk(starts: list[Edge], barrier: set[Edge]) -> Reach:
    """
    Depth first, entering each edge once, expanding each node once.

    The order depends on the graph alone, so the columns of Jacobians are in the same order in every
    run.
    """
    edges: dict[Edge, None] = {}
    expanded: set[Node] = set()
    leaves: list[Tensor] = []
    stack = starts[::-1]
    while stack:
        edge = stack.pop()
        if edge in edges or edge in barrier:
            continue
        # Holding the node keeps its Python wrapper, hence its identity, for the whole walk.
        edges[edge] = None
        node = edge[0]
        if node in expanded:
            continue
        expanded.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(reversed(_next_edges(node)))
    return Reach(edges, tuple(leaves))


def _next_edges(node: Node) -> list[Edge]:
    return [(n, i) for n, i in node.next_functions if n is not None]
