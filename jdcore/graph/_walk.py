from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any, TypeAlias

from attrs import frozen
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from jdcore.graph._saved import WRITTEN_IN_CPP, results_of

Edge: TypeAlias = "tuple[Node, int]"

# A custom function may keep anything under the name `variable`, so leaves are told by this name.
LEAF = "torch::autograd::AccumulateGrad"

# The backward of a reentrant checkpoint runs the forward pass again and differentiates that by a
# pass of its own, so that torch's graph ends at this node.
REENTRANT = "CheckpointFunctionBackward"


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Reach:
    """
    What a differentiation of some outputs passes through.

    :param edges: Every edge of the graph, in a fixed order: node and index of its output. The value
        says how often the edge is used: by a node of the graph or as an output.
    :param nodes: The nodes that are executed and may hold saved tensors, with their names: all but
        those of leaves.
    :param leaves: Leaf tensors that require grad, in the order in which they were found.
    :param functions: Those nodes whose backward is code of others than torch, or of Python: custom
        functions, checkpoints, compiled regions.
    :param stops: The edges at which the walk turned back.
    """

    edges: dict[Edge, int]
    nodes: dict[Node, str]
    leaves: tuple[Tensor, ...]
    functions: tuple[Node, ...]
    stops: frozenset[Edge]

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the outputs depend on a tensor that requires grad."""
        if tensor.is_leaf:  # ten times faster than to ask for its edge
            return id(tensor) in self.leaf_ids
        return edge_of(tensor) in self.edges

    def reaches_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the outputs depend on one of some tensors that require grad."""
        given = list(tensors)
        others = [tensor for tensor in given if not tensor.is_leaf]
        return not self.leaf_ids.isdisjoint(map(id, given)) or any(map(self.reaches, others))

    @cached_property
    def leaf_ids(self) -> set[int]:
        """The leaves by ``id``, since the hash of a tensor is a function of Python."""
        return set(map(id, self.leaves))


def largest_gradient(graph: Reach) -> int:
    """Bytes of the largest gradient that arrives at a node, but for nested ones, of no one size."""
    largest = 0
    for node in graph.nodes:
        for *sizes, dtype in results_of(node):
            if all(isinstance(size, int) for size in sizes):
                largest = max(largest, math.prod(sizes) * dtype.itemsize)
    return largest


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
    # Depth first, entering each edge once, expanding each node once. The order depends on the graph
    # alone, so the columns of Jacobians are in the same order in every run.
    barrier = {edge_of(tensor) for tensor in stop if tensor.requires_grad}
    edges: dict[Edge, int] = {}
    names: dict[Node, str] = {}
    leaves: dict[Node, Tensor] = {}
    functions: list[Any] = []
    stops: set[Edge] = set()
    stack: list[Any] = [edge_of(tensor) for tensor in outputs if tensor.requires_grad][::-1]
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None:  # an operand that is not differentiated
            continue
        if edge in edges:
            edges[edge] += 1
            continue
        if edge in barrier:
            stops.add(edge)
            continue
        # Holding the node keeps its Python wrapper, hence its identity, for the whole walk.
        edges[edge] = 1
        if node in names or node in leaves:
            continue
        name = node.name()
        if name == LEAF:
            leaves[node] = node.variable
            continue
        names[node] = name
        # The base class of nodes whose backward is Python.
        if isinstance(node, BackwardCFunction) or name.endswith(WRITTEN_IN_CPP):
            functions.append(node)
        # Reversed, so that the first operand is the next one to be expanded.
        stack += node.next_functions[::-1]
    # As in a backward pass, what was frozen after the forward pass gets nothing.
    trainable = tuple([leaf for leaf in leaves.values() if leaf.requires_grad])
    return Reach(edges, names, trainable, tuple(functions), frozenset(stops))


def united(graphs: Iterable[Reach]) -> Reach:
    """
    What lies behind the outputs of all of some graphs.

    One may end where another one begins. How often an edge is used is what one of them says.
    """
    given = list(graphs)
    edges: dict[Edge, int] = {}
    nodes: dict[Node, str] = {}
    for graph in given:
        edges |= graph.edges
        nodes |= graph.nodes
    leaves = {id(leaf): leaf for graph in given for leaf in graph.leaves}
    functions = dict.fromkeys([function for graph in given for function in graph.functions])
    stops = frozenset().union(*[graph.stops for graph in given])
    return Reach(edges, nodes, tuple(leaves.values()), tuple(functions), stops)
