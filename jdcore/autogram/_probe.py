"""
The check that samples stay apart, which everything with a ``batch_dim`` rests on.

Weighing the losses of sample b by s_b must scale the gradients of sample b, and only these, by s_b.
One backward pass shows it for every layer at once. Powers of two as weights make the comparison
exact up to what little a differently ordered sum may change.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

_HALF_TOLERANCE = 1e-2
_TOLERANCE = 1e-4


def probe_weights(samples: int) -> Tensor:
    """Weights 1 and 2 for the samples [B], in an order that no layout repeats."""
    bits = torch.randint(2, (samples,), generator=torch.Generator().manual_seed(20240623))
    bits[0], bits[-1] = 0, 1
    return 1.0 + bits


def layout(grads: Tensor, probed: Tensor, weights: Tensor) -> str | None:
    """
    Where the samples are: the first layout in which each was scaled by its own weight.

    :param grads: Gradients of the unweighted losses.
    :param probed: Gradients of the weighted losses.
    :param weights: Shape [B].
    :returns: "major", "minor" or "second" (see :mod:`jdcore.autogram.rules._direct`), or None if
        samples mix.
    """
    B = len(weights)
    half = grads.dtype in (torch.float16, torch.bfloat16)
    weights = weights.to(device=grads.device, dtype=torch.float32 if half else grads.dtype)
    scales = {}
    if grads.ndim > 0 and grads.shape[0] % B == 0:
        repeats = grads.shape[0] // B
        rest = (1,) * (grads.ndim - 1)
        scales["major"] = weights.repeat_interleave(repeats).view(-1, *rest)
        scales["minor"] = weights.repeat(repeats).view(-1, *rest)
    if grads.ndim > 2 and grads.shape[1] == B:
        scales["second"] = weights.view(-1, *(1,) * (grads.ndim - 2))
    for name, scale in scales.items():
        if _equal(probed, grads * scale, _HALF_TOLERANCE if half else _TOLERANCE):
            return name
    return None


def _equal(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = torch.linalg.vector_norm(got - expected)
    # NaN is left to the weighting, which says what it does with it.
    return not bool(error > tolerance * torch.linalg.vector_norm(expected))


class Probe:
    """Remembers for which kinds of graph the check was made, and what it showed."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[str | None, ...]] = {}

    def layouts(self, kind: Hashable) -> tuple[str | None, ...] | None:
        """Layouts by place, or None if this kind of graph was not checked yet."""
        return self._known.get(kind)

    def remember(self, kind: Hashable, layouts: tuple[str | None, ...]) -> None:
        """Store the result of a check."""
        self._known[kind] = layouts
