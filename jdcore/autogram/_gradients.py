from __future__ import annotations

import torch
from torch import Tensor


def accumulate(gradients: dict[Tensor, Tensor]) -> None:
    """
    Add gradients to the ``.grad`` fields of leaves, as a backward pass would.

    :param gradients: Gradient by leaf. They belong to this function.
    """
    for leaf, gradient in gradients.items():
        gradient = gradient.to(leaf.dtype)
        if leaf.grad is None and not _has_hooks(leaf):
            leaf.grad = gradient
        else:
            torch.autograd.backward(leaf, gradient)


def _has_hooks(leaf: Tensor) -> bool:
    # Also of optimizers that step as soon as a gradient is there.
    return bool(leaf._backward_hooks) or bool(leaf._post_accumulate_grad_hooks)
