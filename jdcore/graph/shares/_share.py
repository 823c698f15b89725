from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from jdcore.graph.shares._accumulator import Accumulator
from jdcore.graph.shares._product import widened


class Share(ABC):
    """
    What one operation contributes to the Jacobian with respect to one of its operands.

    The operand belongs to all samples, so there is one row of its shape for each task k and each
    sample b, in the order ``k * B + b``; R = K * B.
    """

    shape: torch.Size
    """The shape of the operand."""

    @abstractmethod
    def add_gramian(self, gramian: Accumulator) -> None:
        """Add the Gramian of the rows."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """
        ``sum_kb weights[k, b] J_kb``, in the shape of the operand.

        :param weights: Shape [K, B].
        """

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows written out, in at least float32, shape ``[K, B, *shape]``."""

    def flat_rows(self) -> Tensor:
        """Rows [K, B, n] whose Gramian is what :meth:`add_gramian` adds."""
        return self.rows().flatten(2)

    def factors_of_samples(self) -> list[tuple[Tensor, int]] | None:
        """
        What the share is made of, with the dimension of samples of each; None if of rows alone.

        With :meth:`of`, samples of several processes are brought together.
        """
        return None

    def of(self, factors: Sequence[Tensor]) -> Share:
        """The same with other samples: factors in place of those that it is made of."""
        raise NotImplementedError


class Dense(Share):
    """
    Rows written out.

    :param rows: Shape ``[K, B, *shape]``, or with any other dimensions behind B of as many entries.
    :param shape: The shape of the operand.
    """

    def __init__(self, rows: Tensor, shape: Sequence[int]) -> None:
        self._rows, self.shape = rows, torch.Size(shape)

    def __repr__(self) -> str:
        K, B = self._rows.shape[:2]
        return f"Dense({K} x {B} rows of {list(self.shape)})"

    def flat(self) -> Tensor:
        """The rows as a matrix [R, n]."""
        K, B = self._rows.shape[:2]
        return widened(self._rows).reshape(K * B, -1)

    def add_gramian(self, gramian: Accumulator) -> None:
        gramian.add_rows(self.flat())

    def weighted(self, weights: Tensor) -> Tensor:
        rows = self.flat()
        return (weights.reshape(1, -1).to(rows.dtype) @ rows).view(self.shape)

    def rows(self) -> Tensor:
        return widened(self._rows).reshape(*self._rows.shape[:2], *self.shape)
