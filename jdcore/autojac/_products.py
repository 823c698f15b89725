"""
Weights that act as one factor of one matrix product: those of linear layers.

With ``y = x Wᵀ`` and the gradient d of an objective at y, the row of W is ``dᵀ x``. Knowing d and
x, the row is written straight to its place, and the share of W in the Gramian needs no row at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from jdcore.graph import MATRIX_PRODUCTS, Reach, Unreadable, edge_of, saved, saved_as_it_is

# Float64 entries of the temporaries of a Gramian: 2 MB stay in cache.
_ENTRIES = 1 << 18


@frozen(eq=False)
class Product:
    """
    How a weight of shape [o, i] (or, not transposed, [i, o]) enters the graph.

    :param edge: Where the gradient d of the product [N, o] arrives.
    :param factor: The other factor, x [N, i].
    :param transposed: Whether the product is ``x Wᵀ`` (linear layers) rather than ``x W``.
    :param multiply: Whether its rows are those of W rather than the gradients d themselves.
    """

    edge: GradientEdge
    factor: Tensor
    transposed: bool
    multiply: bool = True

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Shape of a row."""
        n, o = len(self.factor), weight.shape[0 if self.transposed else 1]
        return tuple(weight.shape) if self.multiply else (n, o)

    def write_row(self, row: Tensor, gradient: Tensor) -> None:
        """Write the row that belongs to the gradient d of one objective."""
        if self.multiply:
            left, right = (gradient, self.factor) if self.transposed else (self.factor, gradient)
            torch.mm(left.T, right, out=row)
        else:
            row.copy_(gradient)

    def has_cheap_gramian(self, weight: Tensor, m: int) -> bool:
        """Whether :meth:`gramian` takes less time and memory than rows of the weight."""
        n, i = self.factor.shape
        o = weight.shape[0 if self.transposed else 1]
        rows = m * i * o * (n // 2 + m)
        return n <= i and n * n * i + m * n * n * o + m * m * n * o < rows

    def gramian(self, gradients: Tensor) -> Tensor:
        """
        Gramian of the rows of W, ``G_kl = <d_k, x xᵀ d_l>``.

        :param gradients: The gradients d of m objectives, [m, N, o].
        :returns: float64 Tensor [m, m].
        """
        m, n, o = gradients.shape
        wide = self.factor.double()
        inner = wide @ wide.T
        total = inner.new_zeros((m, m))
        width = max(1, _ENTRIES // max(1, m * n))
        for start in range(0, o, width):
            piece = gradients[:, :, start : start + width].double()
            total.addmm_((inner @ piece).flatten(1), piece.flatten(1).T)
        return (total + total.T) / 2


def find_products(
    graph: Reach, inputs: Mapping[int, Tensor], *, certain: bool = True
) -> dict[int, Product]:
    """
    Those inputs that enter the graph once, as a factor of a matrix product.

    Left alone are weights with hooks, those whose transpose may have hooks, and products that run
    Python code to get at the other factor, as checkpoints do.

    :param graph: What lies behind the outputs.
    :param inputs: Tensors by their positions, which are those of the products as well.
    :param certain: Whether to leave weights alone of which torch does not show the transpose.
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
        edge: Any = node.next_functions[position]
        behind = _behind_transposition(edge) if graph.edges.get(edge) == 1 else None
        end = edge if behind is None else behind
        if end in positions and graph.edges[end] == 1:
            product = _product(node, name, transposed=behind is not None, certain=certain)
            if product is not None:
                found[positions[end]] = product
    return found


def _behind_transposition(edge: tuple[Node | None, int]) -> tuple[Node | None, int] | None:
    node = edge[0]
    if node is None or node.name() != "TBackward0":
        return None
    behind: tuple[Node | None, int] = node.next_functions[0]
    return behind


def _may_have_hooks(transpose: Any, *, otherwise: bool) -> bool:
    """
    Whether a transposed weight has hooks, which a row that does not pass through it would miss.

    torch saves it, the tensor itself, where the other factor requires grad.

    :param otherwise: The answer where it does not.
    """
    if not isinstance(transpose, Tensor):
        return otherwise
    return bool(transpose._backward_hooks) or transpose.retains_grad


def _product(node: Node, name: str, *, transposed: bool, certain: bool) -> Product | None:
    try:
        if node.name() == "AddmmBackward0" and saved(node, "alpha") != 1:
            return None
        if transposed and _may_have_hooks(saved_as_it_is(node, "mat2"), otherwise=certain):
            return None
        factor = saved_as_it_is(node, name)
    except Unreadable:
        return None
    if not isinstance(factor, Tensor) or factor.layout != torch.strided:
        return None
    return Product(GradientEdge(node, 0), factor.detach(), transposed)
