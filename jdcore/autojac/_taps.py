from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jdcore.autojac._products import Product

Replace = Callable[[Tensor], "Tensor | None"]


@contextmanager
def hooked(tensors: Sequence[Tensor], hooks: Sequence[Replace]) -> Iterator[None]:
    """Replace the gradients that arrive at tensors, for the time of a ``with`` block."""
    register: Callable[..., RemovableHandle] = Tensor.register_hook  # untyped in torch
    handles = [register(tensor, hook) for tensor, hook in zip(tensors, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def listening(
    products: Mapping[int, Product], listeners: Mapping[int, Callable[[Tensor], None]]
) -> Iterator[None]:
    """
    Hear of the gradients at products, for the time of a ``with`` block.

    A product that nothing but its weight is differentiated through is not executed, and not heard
    of: what autograd captures at its edge is its gradient. Where it is executed, what autograd
    captures is not its gradient: the hooks of the tensor come later.
    """
    handles = [
        product.edge.node.register_prehook(partial(_hear, listeners[i]))
        for i, product in products.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hear(listener: Callable[[Tensor], None], gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        listener(gradients[0])


def placeholder(gradient: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return gradient.new_zeros(()).expand(gradient.shape)


class RowTaps:
    """
    Takes the row of each leaf while the backward pass goes on.

    What arrives is written to its place at once and freed, so a row never exists as a whole beside
    the Jacobian.

    :param inputs: Tensors that rows belong to. Those that are no leaves are left alone: replacing
        their gradient would change what lies behind them.
    :param results: The Jacobians ``[m, *S]`` to be filled.
    :param products: Inputs, by position, whose rows are made from the gradient of a product.
    """

    def __init__(
        self, inputs: Sequence[Tensor], results: Sequence[Tensor], products: Mapping[int, Product]
    ) -> None:
        self._leaves = {
            i: tensor for i, tensor in enumerate(inputs) if tensor.is_leaf and i not in products
        }
        self._results = results
        self._products = products
        self._row = 0
        self.taken: set[int] = set()

    def start(self, row: int) -> None:
        """Say which row comes next."""
        self._row = row
        self.taken.clear()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen for the time of a ``with`` block."""
        hooks = [partial(self._take, i) for i in self._leaves]
        multiply = {i: partial(self._multiply, i) for i in self._products}
        with hooked(list(self._leaves.values()), hooks), listening(self._products, multiply):
            yield

    def _take(self, i: int, gradient: Tensor | None) -> Tensor | None:
        # A custom function may pass None on.
        if gradient is None or gradient.layout != torch.strided:
            return gradient
        self._results[i][self._row].copy_(gradient)
        self.taken.add(i)
        return placeholder(gradient)

    def _multiply(self, i: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        self._products[i].write_row(self._results[i][self._row], gradient)
        self.taken.add(i)
