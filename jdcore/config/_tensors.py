from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdcore.errors import ParameterError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
# Not torch.get_default_dtype(): a configuration means the same in every process.
_PLAIN = "float32"


def write_tensor(tensor: Tensor, path: str) -> Any:
    """
    A tensor as data.

    :raises ParameterError: If its dtype has no name here (complex, quantized).
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ParameterError(path, f"of dtype {_choices()}", dtype)
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
    if dtype not in _DTYPES:
        raise ParameterError(f"{path}.dtype", f"one of {_choices()}", repr(dtype))
    try:
        return torch.tensor(data, dtype=_DTYPES[dtype])
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "numbers in lists of equal length"
        raise ParameterError(path, expected, f"{data!r} ({error})") from error


def _choices() -> str:
    return ", ".join(_DTYPES)
