from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_KINDS: dict[tuple[bool, bool], tuple[Any, str]] = {
    (True, False): ((int, float), "a real number"),
    (False, True): (bool, "true or false"),
    (False, False): (int, "a whole number"),
}
"""What an entry may be and how it is called, by whether the dtype is floating and boolean."""

# Not torch.get_default_dtype(): a configuration means the same in every process.
_PLAIN = "float32"


def write_tensor(tensor: Tensor, path: str) -> Any:
    """
    A tensor as data.

    :raises ParameterError: If its dtype has no name here (complex, quantized), or it is on the meta
        device.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ParameterError(path, f"of dtype {_choices()}", dtype)
    if tensor.is_meta:
        raise ParameterError(path, "a Tensor with entries", describe_tensor(tensor))
    data = tensor.detach().cpu().tolist()
    return data if dtype == _PLAIN else {"data": data, "dtype": dtype}


def read_tensor(data: Any, path: str) -> Tensor:
    """
    A tensor from what :func:`write_tensor` made, or from a list somebody typed.

    :raises ParameterError: If it is neither.
    """
    dtype = _PLAIN
    if isinstance(data, Mapping):
        if not {"data"} <= set(data) <= {"data", "dtype"}:
            raise ParameterError(path, "a list, or the keys `data` and `dtype`", str(data))
        data, dtype = data["data"], data.get("dtype", _PLAIN)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ParameterError(f"{path}.dtype", f"one of {_choices()}", repr(dtype))
    _check_entries(data, _DTYPES[dtype], path)
    try:
        return torch.tensor(data, dtype=_DTYPES[dtype], device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        expected = "numbers in lists of equal length"
        raise ParameterError(path, expected, f"{_shown(data)} ({error})") from error


def _check_entries(data: Any, dtype: torch.dtype, path: str) -> None:
    """
    Refuse what torch would change without a word, such as 1.5 for an integer or 1e300 for a float.

    :raises ParameterError: If an entry is of another kind than the dtype, or out of its range.
    """
    if isinstance(data, list):
        for index, item in enumerate(data):
            _check_entries(item, dtype, f"{path}[{index}]")
        return
    kind, expected = _KINDS[dtype.is_floating_point, dtype == torch.bool]
    if not isinstance(data, kind) or (isinstance(data, bool) and dtype != torch.bool):
        raise ParameterError(path, expected, _shown(data))
    # In integers and floats of Python, which compare exactly whatever their size.
    if dtype.is_floating_point and torch.finfo(dtype).max < abs(data) < math.inf:
        name = str(dtype).removeprefix("torch.")
        raise ParameterError(path, f"in the range of {name}", _shown(data))


def _shown(data: Any) -> str:
    try:
        text = repr(data)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "an integer too long to write out"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _choices() -> str:
    return ", ".join(_DTYPES)
