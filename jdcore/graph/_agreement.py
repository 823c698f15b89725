"""
What shows that several gradients that were made at once are those of single passes.

Some derivatives of torch are wrong under vmap, without a word (that of ``cdist``, for one), so a
combination of all rows is compared with what one pass makes of the same combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore.graph.shares import combined


def mixed(rows: Tensor) -> Tensor:
    """One combination of rows [m, ...], in their dtype."""
    return _combination(rows.reshape(len(rows), -1)).view(rows.shape[1:]).to(rows)


def agree(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """
    Whether rows are those of single passes, as far as finite numbers tell.

    :param pairs: Rows [m, ...], and what a single pass made of what :func:`mixed` makes of the
        gradients that they come from. All of them are judged by the largest, since some may be zero
        but for rounding.
    """
    pieces = [_real(rows, expected) for rows, expected in pairs]
    pieces = [(rows, expected) for rows, expected in pieces if rows.numel()]
    if not pieces:
        return True
    device = pieces[0][0].device
    scale = torch.stack([_magnitude(rows).to(device) for rows, _ in pieces]).max()
    # Two orders of summing differ by some eps of the sum of magnitudes. The root of eps is far
    # above that and far below what a wrong derivative is wrong by.
    wrong = [
        (_combination(rows.double()) - expected.double()).abs().max().to(device)
        > torch.finfo(rows.dtype).eps ** 0.5 * scale
        for rows, expected in pieces
    ]
    return not bool(torch.stack(wrong).any())  # what is not finite cannot be told


def _combination(rows: Tensor) -> Tensor:
    # All different and none of them zero, so that rows in a wrong order, or a missing one, show.
    factors = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64, device=rows.device)
    return combined(factors, rows)


def _real(rows: Tensor, expected: Tensor) -> Sequence[Tensor]:
    if rows.is_complex():
        # Torch conjugates lazily, and refuses to view such a tensor as real.
        rows, expected = (torch.view_as_real(t.resolve_conj()) for t in (rows, expected))
    return rows.reshape(len(rows), -1), expected.reshape(-1)


def _magnitude(rows: Tensor) -> Tensor:
    return rows.double().abs().sum(0).max()
