from __future__ import annotations

import torch
from torch import Tensor

from jdcore.autogram._scratch import Scratch

# Longer float32 inner products lose digits (1e-3 for rows of 1e7 entries); shorter ones are no more
# exact and keep the cores less busy.
_COLUMNS = 16384


class Accumulator:
    """
    The Gramian while it grows: a float64 matrix [R, R] to which every block of columns adds.

    :param rows: Number R of objectives. Row ``k * B + b`` belongs to task k and sample b.
    :param keep: Whether the blocks will be asked for a weighted gradient afterwards, so that rows
        they had to compute may be worth keeping.
    :param scratch: Reused memory for temporaries.
    """

    def __init__(self, rows: int, device: torch.device, keep: bool, scratch: Scratch) -> None:
        self.total = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self.keep = keep
        self.scratch = scratch

    def add(self, product: Tensor) -> None:
        """Add a Gramian [R, R] of any floating dtype."""
        self.total += product

    def add_rows(self, rows: Tensor) -> None:
        """Add the Gramian of rows [R, n]."""
        if rows.shape[1] <= _COLUMNS:
            self.total += rows @ rows.T
            return
        for piece in torch.split(rows, _COLUMNS, dim=1):
            self.total += piece @ piece.T
