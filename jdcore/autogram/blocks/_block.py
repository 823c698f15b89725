from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator

Columns = tuple[Parameter, "tuple[int, int] | None"]
"""A parameter, or a range of its first dimension: the columns of J that a block fills."""


class Gradients:
    """Gradients that are summed up parameter by parameter before any of them is handed out."""

    def __init__(self) -> None:
        self.of: dict[Parameter, Tensor] = {}

    def add(self, columns: Columns, gradient: Tensor) -> None:
        """Add the gradient of a parameter, or of a range of its first dimension."""
        parameter, part = columns
        old = self.of.get(parameter)
        if part is None:
            if gradient.shape != parameter.shape:
                gradient = gradient.reshape(parameter.shape)
            self.of[parameter] = gradient if old is None else _plus(old, gradient)
            return
        whole = gradient.new_zeros(parameter.shape) if old is None else old
        whole[slice(*part)] += gradient.reshape(-1, *parameter.shape[1:])
        self.of[parameter] = whole


def _plus(a: Tensor, b: Tensor) -> Tensor:
    # Torch adds sparse to dense, not dense to sparse.
    return b + a if a.is_sparse else a + b


class Block(ABC):
    """
    Some columns of the Jacobian, in a factored form that a rule chose.

    Rows are (task k, sample b), in the order ``k * B + b``; R = K * B.
    """

    columns: tuple[Columns, ...]
    """What the block is the Jacobian with respect to."""

    dtype: torch.dtype
    """Of the computation: float32 or float64."""

    @abstractmethod
    def add_gramian(self, gramian: Accumulator) -> None:
        """Add ``J Jᵀ`` of these columns."""

    @abstractmethod
    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        """
        Add ``sum_kb weights[k, b] J_kb``.

        :param weights: Shape [K, B], dtype of the block.
        """

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """
        Explicit rows with respect to ``parameter[start:stop]``, for a block of one parameter.

        :returns: Shape [R, n].
        """

    def split(self) -> list[Block]:
        """The same columns as blocks of one parameter each."""
        return [self]

    def merged(self, others: Sequence[Block]) -> Block | None:
        """The sum with blocks of the same columns in the same form, or None if there is none."""
        del others
        return None


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """
    ``sum_k weights[k, b] rows[k, b]``: the tasks of each sample merged.

    :param weights: Shape [K, B].
    :param rows: Shape [K, B, ...].
    :returns: Shape [B, ...].
    """
    scale = weights.reshape(*weights.shape, *[1] * (rows.ndim - 2))
    total = rows[0] * scale[0]
    for k in range(1, len(rows)):
        total.addcmul_(rows[k], scale[k])
    return total
