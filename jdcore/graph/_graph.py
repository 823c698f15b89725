from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.errors import UnservedGraphError
from jdcore.graph._retained import retaining
from jdcore.graph._saved import Result, plain_attributes, results_of
from jdcore.graph._walk import LEAF, edge_of

Place = tuple[int, int]
"""The number of a node, and one of its results."""

# The backward of a reentrant checkpoint runs the forward pass again and differentiates that by a
# pass of its own, so that torch's graph ends at this node.
_REENTRANT = "CheckpointFunctionBackward"

# torch numbers the overloads of an operation in the names of nodes: `squeeze()` has 0,
# `squeeze(dim)` 1, and `squeeze(dims)` 2.
ISOMETRIES = frozenset(
    f"{name}Backward0"
    for name in (
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Unsqueeze",
        "Squeeze",
        "ToCopy",
        "Clone",
        "Alias",
    )
) | {"SqueezeBackward1", "SqueezeBackward2"}
"""Operations that only rearrange what they are given, so that inner products stay as they are."""

PARTS = frozenset(
    {"SplitBackward0", "UnsafeSplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"}
)
"""Operations whose results are parts of what they are given that do not overlap."""


class Graph:
    """
    All nodes below some outputs, numbered in the order of one walk, the same for the same graph.

    :param outputs: What was computed.
    :param wanted: The tensors with respect to which they are differentiated.
    :raises UnservedGraphError: If a reentrant checkpoint hides a part of the graph.
    """

    def __init__(self, outputs: Sequence[Tensor], wanted: Collection[Tensor]) -> None:
        self.nodes: list[Any] = []
        self.names: list[str] = []
        self.inputs: list[tuple[Place, ...]] = []
        """By node: where its operands come from; node -1 for what is not differentiated."""
        self.leaves: dict[int, Tensor] = {}
        self._index: dict[Node, int] = {}
        self.starts: list[Place] = []
        for output in outputs:
            if not output.requires_grad:
                continue
            node, number = edge_of(output)
            self.starts.append((self._number(node), number))
        position = 0
        # A list that grows rather than recursion: graphs are deeper than Python's stack.
        while position < len(self.nodes):
            edges: list[Place] = []
            for child, number in self.nodes[position].next_functions:
                edges.append((-1 if child is None else self._number(child), number))
            self.inputs.append(tuple(edges))
            position += 1
        # By identity, since `==` of tensors compares their entries.
        asked = {id(tensor) for tensor in wanted}
        self.wanted = {i: leaf for i, leaf in self.leaves.items() if id(leaf) in asked}
        self.targets: dict[Place, Tensor] = {(i, 0): leaf for i, leaf in self.wanted.items()}
        """The wanted tensors that are in the graph, by their place; leaves or not."""
        for tensor in wanted:
            if self._computes(tensor):
                node, number = edge_of(tensor)
                self.targets[self._index[node], number] = tensor
        self.others = [leaf for i, leaf in self.leaves.items() if i not in self.wanted]
        self.retained = [t for t in retaining() if self._computes(t) and id(t) not in asked]
        """Further results of operations whose ``.grad`` backward passes write."""

    def _computes(self, tensor: Tensor) -> bool:
        return tensor.grad_fn is not None and tensor.grad_fn in self._index

    def _number(self, node: Any) -> int:
        found = self._index.get(node)
        if found is not None:
            return found
        name = node.name()
        if name == _REENTRANT:
            raise UnservedGraphError(
                "a reentrant checkpoint",
                "it hides the operations and the parameters inside it",
                "Call torch.utils.checkpoint.checkpoint with use_reentrant=False.",
            )
        # Holding the node keeps its Python wrapper, hence its identity.
        number = self._index[node] = len(self.nodes)
        self.nodes.append(node)
        self.names.append(name)
        if name == LEAF:
            self.leaves[number] = node.variable
        return number

    @cached_property
    def results(self) -> list[tuple[Result, ...]]:
        """By node: its results."""
        return [
            (Result(self.leaves[i].shape, self.leaves[i].dtype),)
            if i in self.leaves
            else results_of(node)
            for i, node in enumerate(self.nodes)
        ]

    def kind(self) -> tuple[Any, ...]:
        """
        What graphs have in common in which the samples are in the same places.

        Names and edges do not suffice: shapes, dimensions and offsets tell where entries go.
        """
        forms = []
        for i, results in enumerate(self.results):
            shapes = tuple([tuple(result.shape) for result in results])
            forms.append((shapes, () if i in self.leaves else plain_attributes(self.nodes[i])))
        edges = tuple(self.inputs), tuple(self.starts), tuple(self.wanted)
        return tuple(self.names), edges, tuple(forms)

    @cached_property
    def upwards(self) -> list[int]:
        """All nodes, operands before what is computed from them."""
        done: set[int] = set()
        order: list[int] = []
        # A node stays on the stack until all its operands are done, so no recursion is needed here
        # either.
        stack = [start for start, _ in reversed(self.starts)]
        while stack:
            node = stack[-1]
            todo = [c for c, _ in self.inputs[node] if c >= 0 and c not in done]
            if todo and node not in done:
                stack += todo
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                order.append(node)
        return order

    def above(self, nodes: Collection[int]) -> set[int]:
        """The nodes from which another one of some nodes can be reached."""
        found: set[int] = set()
        for node in self.upwards:
            if any(child in found or child in nodes for child, _ in self.inputs[node]):
                found.add(node)
        return found

    @cached_property
    def leading(self) -> set[int]:
        """The nodes that a wanted tensor can be reached from, and those of these tensors."""
        found = {node for node, _ in self.targets}
        for node in self.upwards:
            if any(child in found for child, _ in self.inputs[node]):
                found.add(node)
        return found

    @cached_property
    def rearranged(self) -> set[int]:
        """The leaves, and what does nothing but rearrange one of them."""
        found = set(self.leaves)
        starts = {node for node, _ in self.starts}
        for node in self.upwards:
            if self.names[node] not in ISOMETRIES and self.names[node] not in PARTS:
                continue
            if node not in starts and all(c < 0 or c in found for c, _ in self.inputs[node]):
                found.add(node)
        return found

    def result(self, place: Place) -> Result:
        """What is known of a result."""
        return self.results[place[0]][place[1]]

    def edge(self, place: Place) -> GradientEdge:
        """Where autograd can be asked for the gradient at a place."""
        return GradientEdge(self.nodes[place[0]], place[1])

    @property
    def precision(self) -> torch.dtype:
        """The narrowest floating dtype that gradients pass through on their way to the leaves."""
        dtypes = {
            result.dtype
            for node in self.leading
            for result in self.results[node]
            if result.dtype.is_floating_point
        }
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
