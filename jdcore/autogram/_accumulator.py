from __future__ import annotations

import torch
from torch import Tensor

from jdcore.autogram._scratch import Scratch, pieces

# Longer float32 inner products lose digits (1e-3 for rows of 1e7 entries); shorter ones are no more
# exact and keep the cores less busy.
_COLUMNS = 16384

# Products of fewer rows are slow.
_ROWS = 128


class Accumulator:
    """
    The Gramian while it grows: a float64 matrix [R, R] to which every block of columns adds.

    It is symmetric, so only what is added to the lower triangle counts.

    :param rows: Number R of objectives. Row ``k * B + b`` belongs to task k and sample b.
    :param keep: Whether the blocks will be asked for a weighted gradient afterwards, so that rows
        they had to compute may be worth keeping.
    :param scratch: Reused memory for temporaries.
    """

    def __init__(self, rows: int, device: torch.device, keep: bool, scratch: Scratch) -> None:
        self._lower = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self.rows = rows
        self.keep = keep
        self.scratch = scratch

    @property
    def total(self) -> Tensor:
        """What was added up, exactly symmetric."""
        # A transposed copy is faster than adding what lies transposed.
        upper = self._lower.T.clone(memory_format=torch.contiguous_format).triu_(1)
        return upper.add_(self._lower.tril_())

    def add(self, product: Tensor, first: int = 0) -> None:
        """
        Add some rows of a Gramian, of any floating dtype.

        :param product: Shape [n, c], where c reaches the diagonal at least.
        :param first: The first of the n rows.
        """
        lower = self._lower
        n, c = product.shape
        if n < self.rows:
            lower = lower[first : first + n, :c]
        lower += product

    def add_rows(self, rows: Tensor) -> None:
        """Add the Gramian of rows [R, n]."""
        parts = halves(self.rows)
        for columns in torch.split(rows, _COLUMNS, dim=1):
            for start, stop in parts:
                self.add(lower_product(columns, start, stop), start)


def halves(rows: int) -> list[tuple[int, int]]:
    """Pieces of the rows of a symmetric product, few of which cost little more than one half."""
    return pieces(rows, max(_ROWS, -(-rows // 8))) if rows > _ROWS else [(0, rows)]


def lower_product(rows: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of ``rows @ rows.T``, up to their last entry on the diagonal."""
    if stop - start == rows.shape[0]:
        return rows @ rows.T
    earlier = rows[:stop]
    return earlier[start:] @ earlier.T
