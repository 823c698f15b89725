from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Replace = Callable[[Tensor], Tensor]


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
    """

    def __init__(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        self._leaves = {i: tensor for i, tensor in enumerate(inputs) if tensor.is_leaf}
        self._results = results
        self._row = 0
        self.taken: set[int] = set()

    def start(self, row: int) -> None:
        """Say which row comes next."""
        self._row = row
        self.taken.clear()

    def open(self) -> AbstractContextManager[None]:
        """Listen for the time of a ``with`` block."""
        hooks = [partial(self._take, i) for i in self._leaves]
        return hooked(list(self._leaves.values()), hooks)

    def _take(self, i: int, gradient: Tensor) -> Tensor:
        if gradient.layout != torch.strided:
            return gradient
        self._results[i][self._row].copy_(gradient)
        self.taken.add(i)
        return placeholder(gradient)
