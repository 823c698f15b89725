from __future__ import annotations

import torch
from torch import Tensor


def get_jac(tensor: Tensor) -> Tensor | None:
    """The ``.jac`` of a tensor, None if it has none."""
    return getattr(tensor, "jac", None)


def free_jac(tensor: Tensor) -> None:
    """Remove the ``.jac`` of a tensor."""
    del tensor.jac  # type: ignore[attr-defined]  # a field that autojac adds to tensors


@torch.no_grad()
def accumulate_jac(tensor: Tensor, jacobian: Tensor) -> None:
    """Make a Jacobian that nobody else uses the ``.jac`` of a tensor, or add it to the present."""
    present = get_jac(tensor)
    if present is None:
        tensor.jac = jacobian  # type: ignore[attr-defined]  # a field that autojac adds to tensors
    else:
        present.add_(jacobian)


@torch.no_grad()
def accumulate_grad(tensor: Tensor, gradient: Tensor) -> None:
    """Make a gradient that nobody else uses the ``.grad`` of a tensor, or add it to the present."""
    if tensor.grad is None:
        tensor.grad = gradient
    else:
        tensor.grad.add_(gradient)
