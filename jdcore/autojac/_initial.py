from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jdcore.autojac._checks import check_real, tensor_list
from jdcore.autojac.transform import Diagonalize, Init, Transform
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


def rows_of(outputs: Sequence[Tensor], initial: Sequence[Tensor] | None) -> Transform:
    """Start a Jacobian: from initial Jacobians, or with one row per element of the outputs."""
    if initial is None:
        return Init(outputs) >> Diagonalize(outputs)
    return Init(outputs, initial)


def initial_jacobians(
    value: Tensor | Sequence[Tensor] | None, outputs: Sequence[Tensor], parameter: str
) -> list[Tensor] | None:
    """
    The initial Jacobians as a list, checked against the outputs.

    :raises ParameterTypeError: If they are not tensors of a real floating dtype.
    :raises ParameterError: If their count, shapes, devices or numbers of rows do not fit.
    """
    if value is None:
        return None
    jacobians = tensor_list(value, parameter)
    check_real(jacobians, parameter)
    _check_count(jacobians, outputs, parameter)
    m = jacobians[0].shape[0] if jacobians[0].ndim else 0
    for i, (jacobian, output) in enumerate(zip(jacobians, outputs, strict=True)):
        if jacobian.ndim == 0 or jacobian.shape[1:] != output.shape:
            expected = f"of shape {['m', *output.shape]}".replace("'", "")
            raise ParameterError(f"{parameter}[{i}]", expected, describe_tensor(jacobian))
        if len(jacobian) != m:
            raise ParameterError(
                f"{parameter}[{i}]",
                f"of {m} rows, as {parameter}[0]",
                f"{len(jacobian)} rows",
            )
        _check_device(jacobian, output, f"{parameter}[{i}]")
    if m == 0:
        raise ParameterError(parameter, "of at least one row", "0 rows")
    return jacobians


def initial_gradients(
    value: Tensor | Sequence[Tensor] | None, outputs: Sequence[Tensor], parameter: str
) -> list[Tensor] | None:
    """
    The initial gradients as a list, checked against the outputs.

    :raises ParameterTypeError: If they are not tensors of a real floating dtype.
    :raises ParameterError: If their count, shapes or devices do not fit, or they are left out
        although an output is not a scalar.
    """
    if value is None:
        for i, output in enumerate(outputs):
            if output.numel() != 1:
                raise ParameterError(
                    f"tensors[{i}]",
                    f"a scalar, or come with `{parameter}`",
                    describe_tensor(output),
                    "Reduce it to one loss per task, or say how its elements count.",
                )
        return None
    gradients = tensor_list(value, parameter)
    check_real(gradients, parameter)
    _check_count(gradients, outputs, parameter)
    for i, (gradient, output) in enumerate(zip(gradients, outputs, strict=True)):
        if gradient.shape != output.shape:
            expected = f"of shape {list(output.shape)}, as its tensor"
            raise ParameterError(f"{parameter}[{i}]", expected, describe_tensor(gradient))
        _check_device(gradient, output, f"{parameter}[{i}]")
    return gradients


def _check_count(values: Sequence[Tensor], outputs: Sequence[Tensor], parameter: str) -> None:
    if len(values) != len(outputs):
        raise ParameterError(
            parameter, f"{len(outputs)} tensors, one for each to differentiate", len(values)
        )


def _check_device(value: Tensor, output: Tensor, parameter: str) -> None:
    if value.device != output.device:
        raise ParameterError(
            parameter, f"on {output.device}, as its tensor", f"a tensor on {value.device}"
        )
