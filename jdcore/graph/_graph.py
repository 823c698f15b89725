from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.errors import UnservedGraphError
from jdcore.graph._form import Form, Place, form_of
from jdcore.graph._retained import retaining
from jdcore.graph._saved import function_of, plain_attributes, results_of
from jdcore.graph._walk import LEAF, REENTRANT, edge_of

_Properties: TypeAlias = (
    "tuple[tuple[str, ...], tuple[tuple[Place, ...], ...], tuple[tuple[tuple[Any, ...], ...], ...]]"
)


class Graph:
    """
    All nodes below some outputs, numbered in the order of one walk, the same for the same graph.

    :param outputs: What was computed.
    :param wanted: The tensors with respect to which they are differentiated.
    :raises UnservedGraphError: If a reentrant checkpoint hides a part of the graph, or a leaf is in
        it twice.
    """

    def __init__(self, outputs: Sequence[Tensor], wanted: Collection[Tensor]) -> None:
        starts = [edge_of(output) for output in outputs if output.requires_grad]
        # Holding the nodes keeps their Python wrappers, hence their identity.
        self.nodes: list[Any] = list(dict.fromkeys(node for node, _ in starts))
        self.leaves: dict[int, Tensor] = {}
        self._index: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        properties = self._explore()
        # Torch gives a parameter another node when its dtype changes, and takes the gradient there
        # for its whole one.
        if len({id(leaf) for leaf in self.leaves.values()}) < len(self.leaves):
            raise UnservedGraphError(
                "a parameter whose dtype or device changed between two uses",
                "it is in the graph twice",
                "Compute all losses after the change.",
            )
        # By identity, since `==` of tensors compares their entries.
        asked = {id(tensor) for tensor in wanted}
        self.wanted = {i: leaf for i, leaf in self.leaves.items() if id(leaf) in asked}
        self.targets: dict[Place, Tensor] = {(i, 0): leaf for i, leaf in self.wanted.items()}
        """The wanted tensors that are in the graph, by their place; leaves or not."""
        for tensor in [tensor for tensor in wanted if tensor.grad_fn is not None]:
            if self._computes(tensor):
                node, number = edge_of(tensor)
                self.targets[self._index[node], number] = tensor
        # As in a backward pass, what was frozen after the forward pass gets nothing.
        self.others = [
            leaf for i, leaf in self.leaves.items() if i not in self.wanted and leaf.requires_grad
        ]
        self.retained = [t for t in retaining() if self._computes(t) and id(t) not in asked]
        """Further results of operations whose ``.grad`` backward passes write."""
        self.form: Form = form_of(
            *properties,
            tuple([(self._index[node], number) for node, number in starts]),
            tuple(self.targets),
        )

    def _explore(self) -> _Properties:
        """Number all nodes behind the first ones: their names, operands and results."""
        names: list[str] = []
        inputs: list[tuple[Place, ...]] = []
        described: list[tuple[tuple[Any, ...], ...]] = []
        nodes = self.nodes
        known: dict[Any, int] = {None: -1, **self._index}
        # A list that grows rather than recursion: graphs are deeper than Python's stack.
        for node in nodes:
            name = node.name()
            names.append(name)
            if name == LEAF:
                leaf = self.leaves[len(inputs)] = node.variable
                inputs.append(())
                # The node of a leaf does not know when its data are replaced.
                described.append(((*leaf.shape, leaf.dtype),))
                continue
            if name == REENTRANT:
                raise UnservedGraphError(
                    "a reentrant checkpoint",
                    "it hides the operations and the parameters inside it",
                    "Call torch.utils.checkpoint.checkpoint with use_reentrant=False.",
                )
            edges = []
            for child, result in node.next_functions:
                number = known.get(child)
                if number is None:
                    number = known[child] = len(nodes)
                    nodes.append(child)
                edges.append((number, result))
            inputs.append(tuple(edges))
            described.append(results_of(node))
        del known[None]
        self._index = known
        return tuple(names), tuple(inputs), tuple(described)

    @cached_property
    def functions_of_others(self) -> dict[Any, type]:
        """
        By node, the functions of Python that gradients pass through.

        Torch's own, such as those of compiled regions, are left out: their backward is trusted.
        """
        form = self.form
        if not form.has_functions:
            return {}
        found = {self.nodes[node]: function_of(self.nodes[node]) for node in form.leading}
        return {
            node: function
            for node, function in found.items()
            if function is not None and not function.__module__.startswith("torch.")
        }

    def _computes(self, tensor: Tensor) -> bool:
        return tensor.grad_fn is not None and tensor.grad_fn in self._index

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
