from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import check_flag, describe_tensor, is_frozen


def check_outputs(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check tensors that are to be differentiated.

    :raises ParameterTypeError: If one is not of a real floating dtype.
    :raises ParameterError: If they repeat, hold no element, or none of them requires grad.
    """
    check_differentiable(tensors, parameter)
    check_distinct(tensors, parameter)
    # One empty tensor among others gives no row; nothing but empty ones is more likely a mistake,
    # such as a mask that leaves no sample.
    if all(tensor.numel() == 0 for tensor in tensors):
        raise ParameterError(parameter, "tensors with at least one element", "empty tensors")
    if not any(tensor.requires_grad for tensor in tensors):
        raise ParameterError(
            parameter,
            "tensors of which at least one requires grad",
            describe_all(tensors) + " without grad_fn",
            "Were they computed under torch.no_grad(), detached, from frozen parameters only, or "
            "inside of a transform of torch.func?",
        )


def check_call(
    outputs: Sequence[Tensor], parameter: str, retain_graph: bool, chunk_size: int | None
) -> None:
    """
    Check what all calls that differentiate have in common.

    :param outputs: What is to be differentiated, see :func:`check_outputs`.
    :param parameter: What it is called.
    :param chunk_size: ``parallel_chunk_size``, see :func:`check_chunk_size`.
    :raises ParameterError: If one of these does not fit.
    """
    check_outputs(outputs, parameter)
    check_flag(retain_graph, "retain_graph")
    check_chunk_size(chunk_size)


def check_real(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check that tensors are dense and real.

    :raises ParameterTypeError: If a tensor is not of a real floating dtype, or nested or sparse.
    """
    for i, tensor in enumerate(tensors):
        _check_real(tensor, f"{parameter}[{i}]")


def _check_real(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ParameterTypeError(
            name,
            "of a real floating dtype",
            describe_tensor(tensor),
            "Give real and imaginary parts apart: torch.view_as_real(tensor)."
            if tensor.is_complex()
            else None,
        )
    # autograd differentiates these, but vmap, views of rows and sums in place do not know them.
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ParameterTypeError(
            name,
            "a dense Tensor",
            f"a {kind} Tensor",
            "Differentiate the values of a nested or sparse Tensor: tensor.values().",
        )


def check_differentiable(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check that tensors are of a kind that can be differentiated, or with respect to which.

    :raises ParameterTypeError: As :func:`check_real`.
    :raises ParameterError: If a tensor is on the meta device.
    """
    for i, tensor in enumerate(tensors):
        _check_differentiable(tensor, f"{parameter}[{i}]")


def _check_differentiable(tensor: Tensor, name: str) -> None:
    _check_real(tensor, name)
    if tensor.is_meta:
        raise ParameterError(name, "a Tensor that holds values", "a Tensor on the meta device")


def check_distinct(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check that no tensor comes twice.

    :raises ParameterError: Naming the first repetition.
    """
    # Tensors are told apart by identity here: their hash is that of the object.
    first: dict[Tensor, int] = {}
    for i, tensor in enumerate(tensors):
        if tensor in first:
            raise ParameterError(
                parameter,
                "distinct tensors",
                f"the same one at positions {first[tensor]} and {i}",
                "If an objective is really meant twice, give a copy: tensor.clone().",
            )
        first[tensor] = i


def trainable(tensors: Iterable[Tensor], parameter: str) -> list[Tensor]:
    """
    The distinct tensors among those given, without frozen parameters.

    :raises ParameterTypeError: If another tensor than these is not of a real floating dtype.
    :raises ParameterError: If a tensor that is not an ``nn.Parameter`` does not require grad.
    """
    given = list(tensors)
    for i, tensor in enumerate(given):
        # Frozen ones may be of any kind, such as the integers of quantized layers.
        if is_frozen(tensor):
            continue
        _check_differentiable(tensor, f"{parameter}[{i}]")
        if not tensor.requires_grad:
            raise ParameterError(
                f"{parameter}[{i}]",
                "a tensor that requires grad",
                describe_tensor(tensor) + " that does not",
            )
    return [tensor for tensor in dict.fromkeys(given) if tensor.requires_grad]


def check_accumulates(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check that tensors keep what is accumulated into them.

    :raises ParameterError: If a tensor is neither a leaf nor retains its gradient.
    """
    for i, tensor in enumerate(tensors):
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ParameterError(
                f"{parameter}[{i}]",
                "a leaf, or a tensor that retains its gradient",
                describe_tensor(tensor) + f" computed by {_operation(tensor)}",
                "Call .retain_grad() on it before, or use jac to get its Jacobian directly.",
            )


def check_chunk_size(value: int | None) -> None:
    """
    Check ``parallel_chunk_size``.

    :raises ParameterError: If it is neither None nor a positive int.
    """
    if value is None:
        return
    # A bool is an int to Python, and an integer of numpy is none.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ParameterTypeError("parallel_chunk_size", "an int or None", repr(value))
    if value < 1:
        raise ParameterError(
            "parallel_chunk_size", ">= 1 or None", value, "None lets the library choose."
        )


def describe_all(tensors: Sequence[Tensor]) -> str:
    """A short phrase for one or several tensors."""
    if len(tensors) == 1:
        return describe_tensor(tensors[0])
    return f"{len(tensors)} tensors"


def _operation(tensor: Tensor) -> str:
    return "nothing" if tensor.grad_fn is None else tensor.grad_fn.name()
