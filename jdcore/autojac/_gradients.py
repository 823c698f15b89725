from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from jdcore.linalg._pages import new_tensor


def zeros(tensor: Tensor, m: int) -> Tensor:
    """The Jacobian ``[m, *S]`` of what does not depend on a tensor of shape S."""
    return new_tensor(tensor, m, *tensor.shape).zero_()


def dense(gradient: Tensor) -> Tensor:
    """A gradient that is not sparse."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def disjoint(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Copy those gradients that share memory: with one another (as for a + b), or with others."""
    seen = {other.untyped_storage().data_ptr() for other in others}
    results = []
    for gradient in gradients:
        own = dense(gradient)
        storage = own.untyped_storage()
        whole = own.is_contiguous() and storage.nbytes() == own.numel() * own.itemsize
        if not whole or storage.data_ptr() in seen:
            own = own.clone(memory_format=torch.contiguous_format)
        seen.add(own.untyped_storage().data_ptr())
        results.append(own)
    return results


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
