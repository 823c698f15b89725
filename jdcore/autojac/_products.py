"""
Weights that act as one factor of one matrix product: those of linear layers.

With ``y = x Wᵀ`` and the gradient d of an objective at y, the row of W is ``dᵀ x``. Knowing d and
x, the row is written straight to its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore._fields import check_fits
from jdcore.graph import Reach, edge_of
from jdcore.graph._hooks import hooks_made_lately, node_has_hooks
from jdcore.graph._operations import MATRIX_PRODUCTS
from jdcore.graph._retained import retaining
from jdcore.graph._saved import Unreadable, saved, saved_as_it_is


@frozen(eq=False)
class Product:
    """
    How a weight of shape [o, i] (or, not transposed, [i, o]) enters the graph.

    :param edge: Where the gradient d of the product [N, o] arrives.
    :param factor: The other factor, x [N, i].
    :param transposed: Whether the product is ``x Wᵀ`` (linear layers) rather than ``x W``.
    """

    edge: GradientEdge
    factor: Tensor
    transposed: bool

    def write_row(self, row: Tensor, gradient: Tensor) -> None:
        """Write the row that belongs to the gradient d of one objective."""
        left, right = (gradient, self.factor) if self.transposed else (self.factor, gradient)
        check_fits((left.shape[1], right.shape[1]), row)
        # `out=` refuses what requires grad, hence the detached factor.
        torch.mm(left.T, right, out=row)


def find_products(graph: Reach, inputs: Mapping[int, Tensor]) -> dict[int, Product]:
    """
    Those inputs that enter the graph once, as a factor of a matrix product.

    Left alone are weights with hooks, those whose transpose may have hooks, products with hooks on
    the operation itself, which would not be executed, and those that run Python code to get at the
    other factor, as checkpoints do.

    :param graph: What lies behind the outputs.
    :param inputs: Tensors by their positions, which are those of the products as well.
    """
    candidates = [(node, name) for node, name in graph.nodes.items() if name in MATRIX_PRODUCTS]
    if not candidates:
        return {}
    positions = {
        edge_of(tensor): i
        for i, tensor in inputs.items()
        if tensor.is_leaf and not tensor._backward_hooks and tensor.layout == torch.strided
    }
    found = {}
    for node, operation in candidates:
        position, name = MATRIX_PRODUCTS[operation]
        # A frozen weight has no edge here, and one behind a view, but for its transpose, that of
        # the view: neither is found.
        edge: Any = node.next_functions[position]
        behind = _behind_transposition(edge) if graph.edges.get(edge) == 1 else None
        end = edge if behind is None else behind
        # Used once, and by nothing else: the gradient of this product is all that arrives at the
        # weight.
        if end in positions and graph.edges[end] == 1:
            passed = [node] if behind is None else [node, edge[0]]
            product = _product(node, name, None if behind is None else edge[0])
            if product is not None and not any(map(node_has_hooks, passed)):
                found[positions[end]] = product
    return found


def _behind_transposition(edge: tuple[Node | None, int]) -> tuple[Node | None, int] | None:
    node = edge[0]
    # `F.linear` multiplies by the transpose of its weight, which is an operation of its own.
    if node is None or node.name() != "TBackward0":
        return None
    behind: tuple[Node | None, int] = node.next_functions[0]
    return behind


def _may_have_hooks(node: Node, transposition: Node) -> bool:
    """
    Whether a transposed weight has hooks, which a row that does not pass through it would miss.

    torch saves it, the tensor itself, where the other factor requires grad. Else it is enough that
    nobody made a hook or called ``retain_grad`` since it was computed, be it anywhere.
    """
    transpose = saved_as_it_is(node, "mat2")
    if isinstance(transpose, Tensor):
        return bool(transpose._backward_hooks) or transpose.retains_grad
    retained = any(tensor.grad_fn is transposition for tensor in retaining())
    return retained or hooks_made_lately([transposition])


def _product(node: Node, name: str, transposition: Node | None) -> Product | None:
    try:
        # `beta` scales the bias alone.
        if node.name() == "AddmmBackward0" and saved(node, "alpha") != 1:
            return None
        if transposition is not None and _may_have_hooks(node, transposition):
            return None
        factor = saved_as_it_is(node, name)
    except Unreadable:
        return None
    if not isinstance(factor, Tensor) or factor.layout != torch.strided:
        return None
    return Product(GradientEdge(node, 0), factor.detach(), transposition is not None)
