"""Checks of tensors that are differentiated, or with respect to which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor

from jdcore._modes import is_inside_of, is_wrapped
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import FLOATS, describe_tensor, is_frozen, no_float64

_DISPATCH = Tensor.__torch_dispatch__
_PLAIN = {Tensor, nn.Parameter}


def dispatches(tensor: Tensor) -> bool:
    """Whether the class of a tensor runs all operations by itself, on numbers somewhere else."""
    return type(tensor).__torch_dispatch__ is not _DISPATCH


def plain(tensor: Tensor) -> Tensor:
    """
    A tensor without the class that a user gave it, whose Python code would run in our arithmetic.

    Torch's own derivatives, in C++, do not run it either. Wrappers, whose numbers are somewhere
    else, stay as they are.
    """
    if type(tensor) in _PLAIN or dispatches(tensor):
        return tensor
    return tensor.as_subclass(Tensor)


def check_kind(tensor: Tensor, name: str, remedy: str | None = None) -> None:
    """
    Check that a tensor is dense and real.

    :param name: What it is called.
    :param remedy: What to do about it; by default what suits the kind of tensor.
    :raises ParameterTypeError: If it is not of a real floating dtype, or nested, sparse or masked.
    """
    if tensor.dtype not in FLOATS:
        parts = "Give real and imaginary parts apart: torch.view_as_real(tensor)."
        hint = remedy or (parts if tensor.is_complex() else None)
        raise ParameterTypeError(name, "of a real floating dtype", describe_tensor(tensor), hint)
    # autograd differentiates these, but vmap, views of rows and sums in place do not know them.
    if isinstance(tensor, MaskedTensor):
        hint = remedy or "Mask by torch.where(mask, values, 0.0) in place of torch.masked."
        raise ParameterTypeError(name, "a dense Tensor", "a masked Tensor", hint)
    if not _is_dense(tensor):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ParameterTypeError(
            name,
            "a dense Tensor",
            f"a {kind} Tensor",
            remedy or "Differentiate the values of a nested or sparse Tensor: tensor.values().",
        )


def check_real(tensors: Sequence[Tensor], parameter: str) -> None:
    """:func:`check_kind` for all of a list."""
    for i, tensor in enumerate(tensors):
        check_kind(tensor, f"{parameter}[{i}]")


def check_one(tensor: Tensor, name: str, remedy: str | None = None) -> None:
    """
    Check that a tensor is of a kind that can be differentiated, or with respect to which.

    :raises ParameterTypeError: As :func:`check_kind`.
    :raises ParameterError: If it is on the meta device, or on one without float64.
    """
    check_kind(tensor, name, remedy)
    if tensor.is_mps:
        raise no_float64(name, "Train on the CPU.")
    if tensor.is_meta:
        raise ParameterError(
            name,
            "a Tensor that holds values",
            "a Tensor on the meta device",
            "Give the model memory first: module.to_empty(device=...), and load its parameters.",
        )


def check_differentiable(tensors: Sequence[Tensor], parameter: str) -> None:
    """:func:`check_one` for all of a list."""
    if not _are_plain(tensors):
        for i, tensor in enumerate(tensors):
            check_one(tensor, f"{parameter}[{i}]")


def check_each(tensors: Sequence[Tensor], name: str, remedy: str | None = None) -> None:
    """:func:`check_one` for tensors that are called alike."""
    if not _are_plain(tensors):
        for tensor in tensors:
            check_one(tensor, name, remedy)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`check_one` lets some tensors pass, as nearly all do, with few calls."""
    others = [
        t
        for t in tensors
        if t.layout is not torch.strided
        or t.dtype not in FLOATS
        or (t.is_nested or t.is_meta or t.is_mps)
    ]
    masked = [kind for kind in set(map(type, tensors)) if issubclass(kind, MaskedTensor)]
    return not (others or masked)


def _is_dense(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return strided and not isinstance(tensor, MaskedTensor)


def refuse_transformed(tensors: Sequence[Tensor], parameter: str, remedy: str) -> None:
    """
    Refuse to differentiate inside of transforms of ``torch.func``.

    Tensors of theirs depend on what the transform wraps only: parameters would get nothing. And
    what is written under ``functionalize`` is not there afterwards.

    :param remedy: What to do about it.
    :raises ParameterError: If a tensor exists inside of one, or the call is under functionalize.
    """
    wrapped = any(map(is_wrapped, tensors))
    if wrapped or is_inside_of("Functionalize"):
        raise ParameterError(
            parameter,
            "computed outside of the transforms of torch.func",
            "a tensor inside of vmap, grad or jvp" if wrapped else "a call inside of functionalize",
            remedy,
        )


def check_distinct(tensors: Sequence[Tensor], parameter: str) -> None:
    """
    Check that no tensor comes twice.

    :raises ParameterError: Naming the first repetition.
    """
    first: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        if first.setdefault(id(tensor), i) != i:
            raise ParameterError(
                parameter,
                "distinct tensors",
                f"the same one at positions {first[id(tensor)]} and {i}",
                "If an objective is really meant twice, give a copy: tensor.clone().",
            )


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
        check_one(tensor, f"{parameter}[{i}]")
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
        node = tensor.grad_fn
        if node is not None and not tensor.retains_grad:
            raise ParameterError(
                f"{parameter}[{i}]",
                "a leaf, or a tensor that retains its gradient",
                describe_tensor(tensor) + f" computed by {node.name()}",
                "Call .retain_grad() on it before, or use jac to get its Jacobian directly.",
            )
