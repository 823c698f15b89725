from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from jdcore.linalg._pages import new_tensor


def as_matrix(jacobian: Tensor) -> Tensor:
    """View a Jacobian of shape ``[m, *S]`` as a matrix [m, n]; S may be empty or hold zeros."""
    shape = jacobian.shape
    # Most parameters are vectors: even a view is an operation, which costs a call.
    return jacobian if len(shape) == 2 else jacobian.reshape(shape[0], math.prod(shape[1:]))


def zeros(tensor: Tensor, m: int) -> Tensor:
    """The Jacobian ``[m, *S]`` of what does not depend on a tensor of shape S."""
    return new_tensor(tensor, m, *tensor.shape).zero_()


@contextmanager
def same_grad(tensors: Sequence[Tensor]) -> Iterator[None]:
    """
    Put back the ``.grad`` of tensors that retain it.

    Differentiating writes it as a side effect: sums over the rows, to which an aggregated gradient
    must not be added, or under vmap a tensor that cannot be used outside.
    """
    before = [(t, t.grad) for t in tensors if not t.is_leaf and t.retains_grad]
    try:
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
