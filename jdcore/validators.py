"""
Validation in one grammar, for methods of any origin.

The first group makes `attrs <https://www.attrs.org>`_ validators: given to ``attrs.field`` they run
on construction and on every later set, and a refused value leaves the old one in place. The second
group checks the tensors a method is called with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from attrs import Attribute
from torch import Tensor

from jdcore._modes import without_graph
from jdcore._plain_validators import Validator, boolean, integer, one_of, real
from jdcore.errors import ParameterError, ParameterTypeError

__all__ = [
    "Validator",
    "boolean",
    "check_blocks",
    "check_flag",
    "check_floating",
    "check_gramian",
    "check_matrix",
    "check_second",
    "describe_tensor",
    "generator",
    "holds_real_numbers",
    "integer",
    "one_of",
    "real",
    "row_vector",
    "tensor_list",
]

# Those that torch can calculate with. It counts float8 as floating, too, but only stores it.
FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def describe_tensor(value: object) -> str:
    """
    One phrase for an error message: dtype and shape of a tensor, the type of anything else.

    Also what is unusual about a tensor: that it is nested, sparse, or without values.
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:  # there is no shape to tell
            return f"a nested {dtype} Tensor"
        layout = str(value.layout).removeprefix("torch.").replace("strided", "")
        where = " on the meta device" if value.is_meta else ""
        kind = f"{layout} {dtype}".strip()
        article = "an" if kind.startswith("int") else "a"
        return f"{article} {kind} Tensor of shape {list(value.shape)}{where}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def holds_real_numbers(value: object) -> TypeGuard[Tensor]:
    """Whether something is a dense tensor of real numbers, which are there."""
    # A nested tensor comes first, as some of them know no layout but the usual one.
    return (
        isinstance(value, Tensor)
        and not (value.is_nested or value.is_complex() or value.is_meta)
        and value.layout is torch.strided
    )


def check_flag(value: bool, parameter: str) -> bool:
    """
    Check a switch.

    :returns: The switch.
    :raises ParameterTypeError: If it is not a bool.
    """
    if not isinstance(value, bool):
        raise ParameterTypeError(parameter, "a bool", repr(value))
    return value


def generator(_: Any, attribute: Attribute[Any], value: Any) -> None:
    """A torch.Generator or None (the default generator of torch)."""
    if value is not None and not isinstance(value, torch.Generator):
        raise ParameterTypeError(attribute.name, "a torch.Generator or None", repr(value))


def row_vector(_: Any, attribute: Attribute[Any], value: Any) -> None:
    """A finite real floating vector [m], or None where None is the default."""
    if value is None and attribute.default is None:
        return
    expected = "a finite floating vector with one entry per objective"
    if not isinstance(value, Tensor):
        raise ParameterTypeError(
            attribute.name, expected, describe_tensor(value), "Wrap it: torch.tensor([...])."
        )
    dense = value.layout == torch.strided and not value.is_nested
    if not dense or value.ndim != 1 or value.dtype not in FLOATS:
        raise ParameterError(attribute.name, expected, describe_tensor(value))
    if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
        raise ParameterError(attribute.name, expected, value.tolist())


def tensor_list(
    value: Tensor | Iterable[Tensor], parameter: str, *, least: int = 1
) -> list[Tensor]:
    """
    One tensor or several, as a list.

    :param least: 0 if there may be none, else 1.
    :raises ParameterTypeError: If it is neither, or something in it is no tensor.
    :raises ParameterError: If it is empty and must not be.
    """
    if isinstance(value, Tensor):
        return [value]
    # A string is iterable, too, and would be taken for a sequence of characters.
    # So are some modules, which would be taken for a sequence of their children.
    text_or_module = isinstance(value, (str, bytes, torch.nn.Module))
    # Once, as it may be an iterator such as model.parameters().
    tensors = None if text_or_module else items(value)
    if tensors is None:
        raise _no_tensor(parameter, "a Tensor or a sequence of Tensors", value)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise _no_tensor(f"{parameter}[{i}]", "a Tensor", tensor)
    if len(tensors) < least:
        raise ParameterError(parameter, "at least one Tensor", "none")
    return tensors


def items(value: object) -> list[Any] | None:
    """What is in an iterable; None if a value is none, although its type may say that it is one."""
    try:
        iterator = iter(value)  # type: ignore[call-overload]
    except TypeError:  # of an array of no dimensions, too
        return None
    return list(iterator)


def is_frozen(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that does not require grad: any other one is a mistake."""
    return not tensor.requires_grad and isinstance(tensor, torch.nn.Parameter)


def _no_tensor(parameter: str, expected: str, value: object) -> ParameterTypeError:
    word = repr(value) if value is None else describe_tensor(value)
    is_module = isinstance(value, torch.nn.Module)
    hint = "If its parameters are meant, pass module.parameters()." if is_module else None
    return ParameterTypeError(parameter, expected, word, hint)


def check_floating(tensor: Tensor, parameter: str, expected: str = "a Tensor") -> None:
    """
    Refuse anything that is not a dense Tensor of real floating numbers.

    :param expected: What it should be, for the message to those who give no Tensor.
    :raises ParameterTypeError: If it is no Tensor, or not of a real floating dtype.
    :raises ParameterError: If it is sparse or nested, or has no entries, as on the meta device, or
        is on a device without float64.
    """
    if not isinstance(tensor, Tensor):
        raise ParameterTypeError(parameter, expected, describe_tensor(tensor))
    # Before the dtype, which a user could convert in vain.
    if tensor.is_mps:
        raise no_float64(parameter, f"Move it: {parameter}.cpu().")
    if tensor.dtype not in FLOATS:
        raise ParameterTypeError(
            parameter,
            "of a real floating dtype",
            describe_tensor(tensor),
            f"Convert it: {parameter}.to(torch.float32).",
        )
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        hint = None if tensor.is_meta or tensor.is_nested else f"Fill it: {parameter}.to_dense()."
        raise ParameterError(
            parameter, "a dense Tensor with entries", f"{describe_tensor(tensor)} {kind}", hint
        )


def no_float64(parameter: str, remedy: str) -> ParameterError:
    """The error for tensors on Apple's MPS, on which torch has no float64."""
    return ParameterError(
        parameter,
        "on a device with float64, in which Gramians are summed",
        "a Tensor on mps",
        remedy,
    )


def check_matrix(matrix: Tensor, parameter: str = "matrix") -> None:
    """
    Refuse anything that is not a dense, real floating matrix.

    :raises ParameterTypeError: If it is no Tensor, or not of a real floating dtype.
    :raises ParameterError: If it is not dense, or does not have two dimensions.
    """
    # A call less where nothing is unusual, as it nearly always is.
    usual = type(matrix) is Tensor and matrix.is_cpu and matrix.layout is torch.strided
    if not usual or matrix.is_nested or matrix.dtype not in FLOATS:
        check_floating(matrix, parameter, "a Tensor of shape [m, n]")
    if matrix.ndim != 2:
        raise ParameterError(
            parameter,
            "a matrix of shape [m, n]",
            describe_tensor(matrix),
            f"Flatten each row: {parameter}.flatten(1)." if matrix.ndim > 2 else None,
        )


def check_blocks(blocks: Sequence[Tensor], parameter: str = "blocks") -> int:
    """
    Refuse anything that is not the column blocks of one real floating matrix.

    :returns: The number of rows, m.
    :raises ParameterTypeError: If a block is no Tensor, or not of a real floating dtype.
    :raises ParameterError: If there is no block, a block does not have two dimensions, or the
        blocks differ in their number of rows.
    """
    if not blocks:
        raise ParameterError(parameter, "at least one matrix", "none")
    for block in blocks:
        check_matrix(block, parameter)
        if block.shape[0] != blocks[0].shape[0]:
            expected = f"matrices with {blocks[0].shape[0]} rows, as the first"
            raise ParameterError(parameter, expected, describe_tensor(block))
    return blocks[0].shape[0]


def check_second(second: Sequence[Tensor] | None, blocks: Sequence[Tensor]) -> list[Tensor] | None:
    """
    The column blocks of a second Jacobian, detached.

    :raises ParameterTypeError: If one of them is no real floating Tensor.
    :raises ParameterError: If they differ in shape from those of the first.
    """
    if second is None:
        return None
    for block in second:
        check_matrix(block, "second")
    # All shapes at once, since what belongs together is told by their order.
    shapes, got = ([list(block.shape) for block in given] for given in (blocks, second))
    if shapes != got:
        raise ParameterError("second", f"of shape {_shapes(shapes)}, as the first", _shapes(got))
    return [without_graph(block) for block in second]


def _shapes(shapes: list[list[int]]) -> str:
    return " and ".join(map(str, shapes))


def check_gramian(gramian: Tensor) -> None:
    """
    Refuse anything that is not a real floating square matrix.

    :raises ParameterTypeError: If it is no Tensor, or not of a real floating dtype.
    :raises ParameterError: If it is not square.
    """
    check_matrix(gramian, "gramian")
    if gramian.shape[0] != gramian.shape[1]:
        raise ParameterError(
            "gramian",
            "square, of shape [m, m]",
            describe_tensor(gramian),
            "Give the Gramian J @ J.T of a Jacobian J, or use the aggregator on J itself.",
        )
