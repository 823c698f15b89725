"""What code of others returns, checked where torch's and numpy's own errors would be raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor, holds_real_numbers


def real_array(answer: Any) -> NDArray[np.float64] | None:
    """A new float64 array of what is one of real numbers, be it a Tensor or a list; else None."""
    try:
        array = np.asarray(answer.detach() if isinstance(answer, Tensor) else answer)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors of an accelerator
        return None
    return np.array(array, dtype=np.float64) if array.dtype.kind in "biuf" else None


def describe_answer(answer: Any) -> str:
    """One phrase for an error message: dtype and shape of an array or a Tensor, else its type."""
    if isinstance(answer, np.ndarray):
        return f"an array of {answer.dtype} of shape {list(answer.shape)}"
    return describe_tensor(answer)


def array_for(method: str, form: str, answer: Any) -> NDArray[np.float64]:
    """
    What a method of a subclass returns, as a new float64 array.

    :param method: Its name, for the error.
    :param form: The shape that is expected, for the error.
    :raises ParameterError: If it is no array of real numbers.
    """
    array = real_array(answer)
    if array is not None:
        return array
    raise ParameterError(
        method, f"a method that returns a real array {form}", describe_answer(answer)
    )


def checked_vectors(vectors: Any, blocks: Sequence[Tensor]) -> list[Tensor]:
    """
    What an aggregator returns for column blocks.

    :raises ParameterError: If it is no list of one real vector for each block.
    """
    shapes = [(block.shape[1],) for block in blocks]
    several = isinstance(vectors, Sequence)
    got = list(map(shape_of, vectors)) if several else describe_tensor(vectors)
    if got == shapes:
        return list(vectors)
    raise ParameterError(
        "aggregator", f"one that returns real vectors of shapes {shapes}", f"shapes {got}"
    )


def shape_of(vector: object) -> tuple[int, ...] | str:
    """The shape of a Tensor of real numbers, else what it is."""
    return tuple(vector.shape) if holds_real_numbers(vector) else describe_tensor(vector)
