from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jdcore._fields import check_fits
from jdcore._handles import own_hooks
from jdcore.autojac._products import Product
from jdcore.autojac._rows import Rows
from jdcore.graph._nesting import OuterPass

Replace = Callable[[Tensor], "Tensor | None"]

# Entries from which on a row is taken while the pass goes on, on CPUs: 256 KB in float32. Smaller
# ones cost little memory, and to copy them all together afterwards costs less than a hook for each.
_WORTH_A_HOOK = 1 << 16


@contextmanager
def hooked(tensors: Sequence[Tensor], hooks: Sequence[Replace]) -> Iterator[None]:
    """Replace the gradients that arrive at tensors, for the time of a ``with`` block."""
    register: Callable[..., RemovableHandle] = Tensor.register_hook  # untyped in torch
    with own_hooks(map(register, tensors, hooks)):
        yield


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
    made = (
        product.edge.node.register_prehook(partial(_hear, listeners[i]))
        for i, product in products.items()
    )
    with own_hooks(made):
        yield


def _hear(listener: Callable[[Tensor], None], gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        listener(gradients[0])


def placeholder(gradient: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return gradient.new_zeros(()).expand(gradient.shape)


def worth_a_hook(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """By position, those whose rows should not wait for the end of the pass that makes them."""
    return {i: t for i, t in enumerate(tensors) if t.is_cpu and t.numel() >= _WORTH_A_HOOK}


class RowTaps:
    """
    Takes the rows of large leaves while the backward pass goes on.

    What arrives is written to its place at once and freed, so a row never exists as a whole beside
    the Jacobian.

    :param inputs: Tensors that rows belong to. Those that are no leaves are left alone: replacing
        their gradient would change what lies behind them.
    :param products: Inputs, by position, whose rows are made from the gradient of a product.
    :param rows: Where the rows are written to.
    """

    def __init__(
        self, inputs: Sequence[Tensor], products: Mapping[int, Product], rows: Rows
    ) -> None:
        self._leaves = {
            i: tensor
            for i, tensor in worth_a_hook(inputs).items()
            if tensor.is_leaf and i not in products
        }
        self._products = products
        self._pass = OuterPass()
        self._rows, self._k = rows, 0
        self.taken: set[int] = set()

    def start(self, k: int) -> None:
        """Say that the next pass makes the k-th row."""
        self._k = k
        self._pass.expect()
        self.taken = set()

    @contextmanager
    def open(self, outputs: Sequence[Tensor]) -> Iterator[None]:
        """Listen to passes that start at some outputs, for the time of a ``with`` block."""
        hooks = [partial(self._take, i) for i in self._leaves]
        multiply = {i: partial(self._multiply, i) for i in self._products}
        # Without a listener there is nothing to tell apart, and the hook at the outputs would cost
        # a call for each row.
        if not (hooks or multiply):
            yield
            return
        with (
            self._pass.starting_at(outputs),
            hooked(list(self._leaves.values()), hooks),
            listening(self._products, multiply),
        ):
            yield

    def _take(self, i: int, gradient: Tensor | None) -> Tensor | None:
        # A custom function may pass None on, and a pass inside ours needs its gradient itself.
        # Sparse gradients are made dense where all rows are stored: here a copy would fail.
        if gradient is None or gradient.layout != torch.strided or not self._pass.is_running():
            return None
        place = self._take_place(i)
        check_fits(gradient.shape, place)
        place.copy_(gradient)
        # What autograd goes on with instead, so that it does not hold the row as well.
        return placeholder(gradient)

    def _multiply(self, i: int, gradient: Tensor) -> None:
        if self._pass.is_running():
            self._products[i].write_row(self._take_place(i), gradient)

    def _take_place(self, i: int) -> Tensor:
        self.taken.add(i)
        return self._rows.place(i, self._k)
