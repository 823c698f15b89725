from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.errors import UnservedGraphError
from jdcore.graph._form import Form, Place, form_of
from jdcore.graph._retained import retaining
from jdcore.graph._saved import plain_attributes, results_of
from jdcore.graph._walk import LEAF, REENTRANT, edge_of


class Graph:
    """
    All nodes below some outputs, numbered in the order of one walk, the same for the same graph.

    :param outputs: What was computed.
    :param wanted: The tensors with respect to which they are differentiated.
    :raises UnservedGraphError: If a reentrant checkpoint hides a part of the graph.
    """

    def __init__(self, outputs: Sequence[Tensor], wanted: Collection[Tensor]) -> None:
        self.nodes: list[Any] = []
        self.leaves: dict[int, Tensor] = {}
        self._names: list[str] = []
        self._index: dict[Node, int] = {}
        starts = []
        for output in outputs:
            if output.requires_grad:
                node, number = edge_of(output)
                found = self._index.get(node)
                starts.append((self._number(node) if found is None else found, number))
        inputs: list[tuple[Place, ...]] = []
        described: list[tuple[tuple[Any, ...], ...]] = []
        # A list that grows rather than recursion: graphs are deeper than Python's stack.
        index, number_of, leaves = self._index, self._number, self.leaves
        for i, node in enumerate(self.nodes):
            edges = []
            for child, result in node.next_functions:
                found = -1 if child is None else index.get(child)
                edges.append((number_of(child) if found is None else found, result))
            inputs.append(tuple(edges))
            leaf = leaves.get(i)
            # The node of a leaf does not know when its data are replaced.
            described.append(results_of(node) if leaf is None else ((*leaf.shape, leaf.dtype),))
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
        self.form: Form = form_of(
            tuple(self._names), tuple(inputs), tuple(starts), tuple(described), tuple(self.targets)
        )

    def _computes(self, tensor: Tensor) -> bool:
        return tensor.grad_fn is not None and tensor.grad_fn in self._index

    def _number(self, node: Any) -> int:
        """The number of a node that has none yet."""
        name = node.name()
        if name == REENTRANT:
            raise UnservedGraphError(
                "a reentrant checkpoint",
                "it hides the operations and the parameters inside it",
                "Call torch.utils.checkpoint.checkpoint with use_reentrant=False.",
            )
        # Holding the node keeps its Python wrapper, hence its identity.
        number = self._index[node] = len(self.nodes)
        self.nodes.append(node)
        self._names.append(name)
        if name == LEAF:
            self.leaves[number] = node.variable
        return number

    def way(self, root: Place) -> tuple[int, tuple[Any, ...]]:
        """
        How an operand is made of a tensor by nothing but rearranging it, or taking a part.

        :returns: The node of the tensor, and what tells this way from others to the same tensor.
        """
        (node, number), steps = root, []
        while self.form.inputs[node]:
            name, integers = self.form.names[node], plain_attributes(self.nodes[node])
            steps.append((name, number, integers))
            node, number = self.form.inputs[node][0]
        return node, tuple(steps)

    def edge(self, place: Place) -> GradientEdge:
        """Where autograd can be asked for the gradient at a place."""
        return GradientEdge(self.nodes[place[0]], place[1])
