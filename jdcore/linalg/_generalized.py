from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


def objectives_shape(gramian: Tensor, /) -> tuple[int, ...]:
    """
    Shape [m1, ..., mk] of the losses behind a generalized Gramian [m1, ..., mk, mk, ..., m1].

    :raises ParameterError: If the shape does not read the same in both directions.
    """
    shape = tuple(gramian.shape)
    k, odd = divmod(len(shape), 2)
    if odd or shape != shape[::-1]:
        raise ParameterError(
            "gramian",
            "a generalized Gramian of shape [m1, ..., mk, mk, ..., m1]",
            describe_tensor(gramian),
        )
    return shape[:k]


def flatten_gramian(gramian: Tensor, /) -> Tensor:
    """
    Matrix [m, m] with m = m1 * ... * mk of a generalized Gramian [m1, ..., mk, mk, ..., m1].

    Row and column order are that of the flattened tensor of losses.

    :raises ParameterError: If the shape does not read the same in both directions.
    """
    shape = objectives_shape(gramian)
    m = math.prod(shape)
    return _reverse_second_half(gramian, len(shape)).reshape(m, m)


def unflatten_gramian(gramian: Tensor, /, shape: Sequence[int]) -> Tensor:
    """
    Generalized Gramian [m1, ..., mk, mk, ..., m1] of a matrix [m, m] with m = m1 * ... * mk.

    :param gramian: Gramian of the flattened losses.
    :param shape: Shape [m1, ..., mk] of the losses.
    :raises ParameterError: If the sizes do not agree.
    """
    m = math.prod(shape)
    if gramian.shape != (m, m):
        raise ParameterError("gramian", f"of shape [{m}, {m}]", describe_tensor(gramian))
    return _reverse_second_half(gramian.reshape((*shape, *shape)), len(shape))


def _reverse_second_half(tensor: Tensor, k: int) -> Tensor:
    # G[i, j, j', i'] belongs to the losses [i, j] and [i', j']: the second indices come in the
    # order of a transpose.
    return tensor.permute((*range(k), *range(2 * k - 1, k - 1, -1)))
