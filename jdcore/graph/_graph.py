"""
The graph of a step, numbered, and its form: what the graphs of all steps have in common.

What follows from names, shapes and edges alone is found out once, for the form.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence, Set
from contextlib import suppress
from functools import cached_property, wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch
from attrs import field, frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.errors import UnservedGraphError
from jdcore.graph._operations import PARTS, REARRANGING, operation
from jdcore.graph._retained import retaining
from jdcore.graph._saved import (
    WRITTEN_IN_CPP,
    Unreadable,
    function_of_others,
    plain_attributes,
    results_of,
    saved_as_it_is,
)
from jdcore.graph._walk import LEAF, edge_of

P = ParamSpec("P")
R = TypeVar("R")

Place: TypeAlias = "tuple[int, int]"
"""The number of a node, and one of its results."""


class Result(NamedTuple):
    """What is known of a result of an operation without having it."""

    shape: torch.Size
    dtype: torch.dtype


@frozen(eq=False, slots=False)  # slots leave no room for cached properties
class Form:
    """
    What the graphs of all steps of a training have in common, and what follows from it.

    Equal forms are one object (see :func:`form_of`), so what was found out once is known for all
    later graphs of this form.

    :param names: By node, that of its operation.
    :param inputs: By node, where its operands come from; node -1 for what is not differentiated.
    :param described: By node, the sizes of each of its results, and its dtype behind them.
    :param starts: The outputs.
    :param targets: The places of the wanted tensors, leaves or not.
    """

    names: tuple[str, ...]
    inputs: tuple[tuple[Place, ...], ...]
    described: tuple[tuple[tuple[Any, ...], ...], ...]
    starts: tuple[Place, ...]
    targets: tuple[Place, ...]
    known: dict[Any, Any] = field(factory=dict, init=False)
    """What others found out about it, see :func:`once_for_each_form`."""

    @cached_property
    def results(self) -> list[list[Result]]:
        """By node, its results."""
        return [
            [Result(torch.Size(sizes), dtype) for *sizes, dtype in of_node]
            for of_node in self.described
        ]

    @cached_property
    def operations(self) -> list[str]:
        """By node, its operation, whatever the overload; empty for what is none of torch."""
        return [operation(name) for name in self.names]

    @cached_property
    def leaves(self) -> frozenset[int]:
        """The nodes of leaves."""
        return frozenset(node for node, name in enumerate(self.names) if name == LEAF)

    @cached_property
    def wanted(self) -> frozenset[int]:
        """The nodes of leaves that are wanted."""
        return frozenset(node for node, _ in self.targets if node in self.leaves)

    @cached_property
    def upwards(self) -> list[int]:
        """All nodes, operands before what is computed from them."""
        done: set[int] = set()
        order: list[int] = []
        # A node stays on the stack until all its operands are done, so no recursion is needed.
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

    def above(self, nodes: Set[int]) -> set[int]:
        """The nodes from which another one of some nodes can be reached."""
        found: set[int] = set()
        for node in self.upwards:
            if any(child in found or child in nodes for child, _ in self.inputs[node]):
                found.add(node)
        return found

    @cached_property
    def has_functions(self) -> bool:
        """Whether the backward of some node may be code of somebody else than torch."""
        # Behind "Backward", nodes of torch's own operations have the number of an overload.
        return any(name.endswith(("Backward", WRITTEN_IN_CPP)) for name in self.names)

    @cached_property
    def leading(self) -> set[int]:
        """The nodes that a wanted tensor can be reached from, and those of these tensors."""
        found = {node for node, _ in self.targets}
        return found | self.above(found)

    @cached_property
    def rearranged(self) -> set[int]:
        """The leaves, and what does nothing but rearrange one of them."""
        found = set(self.leaves)
        starts, ways = {node for node, _ in self.starts}, REARRANGING | PARTS
        for node in self.upwards:
            if self.operations[node] not in ways:
                continue
            if node not in starts and all(c < 0 or c in found for c, _ in self.inputs[node]):
                found.add(node)
        return found

    @cached_property
    def used(self) -> list[Place]:
        """The results that something is computed from, and the outputs, in order."""
        return sorted({place for edges in self.inputs for place in edges} | {*self.starts})

    @cached_property
    def precision(self) -> torch.dtype:
        """The narrowest floating dtype that gradients pass through on their way to the leaves."""
        dtypes = {
            result.dtype
            for node in self.leading
            for result in self.results[node]
            if result.dtype.is_floating_point
        }
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def result(self, place: Place) -> Result:
        """What is known of a result."""
        return self.results[place[0]][place[1]]


# Of sequences of ever new lengths there are ever new forms: those that nobody has are forgotten.
_FORMS: WeakValueDictionary[tuple[Any, ...], Form] = WeakValueDictionary()

# Large graphs of ever new lengths take memory: besides those of plans, forms of the last steps are
# kept.
_RECENT: deque[Form] = deque(maxlen=32)


def form_of(*properties: Any) -> Form:
    """The one form with some properties, as :class:`Form` takes them."""
    form = _FORMS.get(properties)
    if form is None:
        form = _FORMS[properties] = Form(*properties)
    _RECENT.append(form)
    return form


def once_for_each_form(function: Callable[P, R]) -> Callable[P, R]:
    """
    Let a function of a form keep what it returns, for as long as there is the form.

    :param function: Its first argument is the form, the others can be hashed.
    """

    @wraps(function)
    def known(*arguments: P.args, **options: P.kwargs) -> R:
        form: Any = arguments[0]
        key = (function, *arguments[1:])
        if key not in form.known:
            form.known[key] = function(*arguments, **options)
        found: R = form.known[key]
        return found

    return known


class Walk:
    """
    All nodes below some outputs, numbered in the order of one walk, the same for the same graph.

    :param outputs: What was computed.
    """

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.starts = [edge_of(output) for output in outputs if output.requires_grad]
        # Holding the nodes keeps their Python wrappers, hence their identity.
        self.nodes: list[Any] = list(dict.fromkeys(node for node, _ in self.starts))
        self.index: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        inputs: list[tuple[Place, ...]] = []
        # A list that grows rather than recursion: graphs are deeper than Python's stack.
        nodes, known = self.nodes, self.index
        for node in nodes:
            edges = []
            for child, k in node.next_functions:
                number = -1 if child is None else known.get(child)
                if number is None:
                    number = known[child] = len(nodes)
                    nodes.append(child)
                edges.append((number, k))
            inputs.append(tuple(edges))
        self.inputs = tuple(inputs)
        """By node, where its operands come from, as :class:`Form` has it."""
        self.names = tuple([node.name() for node in nodes])
        self.leaves: dict[int, Tensor] = {
            i: nodes[i].variable for i, name in enumerate(self.names) if name == LEAF
        }


class Graph:
    """
    What a differentiation of some outputs passes through.

    :param walk: All nodes below the outputs.
    :param wanted: The tensors with respect to which they are differentiated.
    :raises UnservedGraphError: If a leaf is in it twice.
    """

    def __init__(self, walk: Walk, wanted: Collection[Tensor]) -> None:
        self.nodes, self.leaves, self._index = walk.nodes, walk.leaves, walk.index
        # Torch gives a parameter another node when its dtype changes, and takes the gradient there
        # for its whole one.
        if len(set(map(id, self.leaves.values()))) < len(self.leaves):
            raise UnservedGraphError(
                "a parameter whose dtype or device changed between two uses",
                "it is in the graph twice",
                "Compute all losses after the change.",
            ).at(leaf for leaf, n in Counter(self.leaves.values()).items() if n > 1)
        # By identity, since `==` of tensors compares their entries.
        asked = set(map(id, wanted))
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
        # The node of a leaf does not know when its data are replaced.
        described = tuple(
            [
                ((*leaf.shape, leaf.dtype),)
                if (leaf := self.leaves.get(i)) is not None
                else results_of(node)
                for i, node in enumerate(self.nodes)
            ]
        )
        starts = tuple([(self._index[node], number) for node, number in walk.starts])
        self.form: Form = form_of(walk.names, walk.inputs, described, starts, tuple(self.targets))

    @cached_property
    def functions_of_others(self) -> dict[Any, type]:
        """By node, the functions of others that gradients pass through, without torch's own."""
        form = self.form
        if not form.has_functions:
            return {}
        found = {self.nodes[node]: function_of_others(self.nodes[node]) for node in form.leading}
        return {node: function for node, function in found.items() if function is not None}

    def _computes(self, tensor: Tensor) -> bool:
        return tensor.grad_fn is not None and tensor.grad_fn in self._index

    def way(self, root: Place) -> tuple[int, tuple[Any, ...]]:
        """
        How an operand is made of a tensor by nothing but rearranging it, or taking a part.

        :returns: The node of the tensor, and what tells this way from others to the same tensor.
        """
        (node, number), steps = root, []
        while self.form.inputs[node]:
            [integers] = plain_attributes([self.nodes[node]])
            steps.append((self.form.names[node], number, integers))
            node, number = self.form.inputs[node][0]
        return node, tuple(steps)

    def belonging_to(self, node: Any) -> list[Tensor]:
        """The wanted leaves that enter an operation as they are or rearranged, and its buffers."""
        form, found = self.form, list[Tensor]()
        for place in form.inputs[self._index[node]]:
            if place[0] in form.rearranged and (leaf := self.way(place)[0]) in self.wanted:
                found.append(self.wanted[leaf])
        # Normalizations may have no parameters, and keep what they write in the forward pass.
        with suppress(Unreadable):
            found.append(saved_as_it_is(node, "running_mean"))
        return [tensor for tensor in found if tensor is not None]

    def edges(self, places: Sequence[Place]) -> list[GradientEdge]:
        """Where autograd can be asked for the gradients at places."""
        return [GradientEdge(self.nodes[node], number) for node, number in places]
