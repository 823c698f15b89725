from __future__ import annotations

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


def get_jac(tensor: Tensor) -> Tensor | None:
    """The ``.jac`` of a tensor, None if it has none."""
    return getattr(tensor, "jac", None)


def free_jac(tensor: Tensor) -> None:
    """Remove the ``.jac`` of a tensor."""
    del tensor.jac  # type: ignore[attr-defined]  # a field that autojac adds to tensors


def check_jac_field(tensor: Tensor, m: int) -> None:
    """
    Check that m rows can be added to the ``.jac`` of a tensor.

    :raises ParameterError: If there is a ``.jac`` of another shape, dtype or device.
    """
    present = get_jac(tensor)
    if present is None:
        return
    fits = (
        isinstance(present, Tensor)
        and present.shape == (m, *tensor.shape)
        and present.dtype == tensor.dtype
        and present.device == tensor.device
    )
    if not fits:
        raise ParameterError(
            ".jac",
            f"of shape {[m, *tensor.shape]}, {str(tensor.dtype).removeprefix('torch.')} and on "
            f"{tensor.device} for {m} rows to be added to it",
            describe_tensor(present),
            "Aggregate or delete the .jac of earlier calls first (jac_to_grad frees it).",
        )


def check_grad_field(tensor: Tensor) -> None:
    """
    Check that a gradient can be added to the ``.grad`` of a tensor.

    :raises ParameterError: If there is a ``.grad`` that is not a dense tensor of the same shape.
    """
    if tensor.grad is not None and tensor.grad.layout != torch.strided:
        raise ParameterError(".grad", "None or a dense tensor", f"a {tensor.grad.layout} tensor")


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
    if tensor.grad is not None:
        tensor.grad.add_(gradient)
    elif tensor.is_contiguous():
        tensor.grad = gradient
    else:  # as torch does: the memory layout of the tensor, which optimizers are fast on
        tensor.grad = torch.empty_like(tensor).copy_(gradient)
