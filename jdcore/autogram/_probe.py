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


def apart(grads: Tensor, probed: Tensor, weights: Tensor) -> bool:
    """
    Whether the entries of sample b were scaled by its weight.

    :param grads: Gradients [N, ...] of the unweighted losses; sample b owns N / B entries in turn.
    :param probed: Gradients of the weighted losses.
    :param weights: Shape [B].
    """
    B = len(weights)
    if grads.ndim == 0 or grads.shape[0] % B:
        return False
    half = grads.dtype in (torch.float16, torch.bfloat16)
    scale = weights.to(device=grads.device, dtype=torch.float32 if half else grads.dtype)
    expected = grads.reshape(B, -1) * scale[:, None]
    error = torch.linalg.vector_norm(probed.reshape(B, -1) - expected)
    size = torch.linalg.vector_norm(expected)
    # NaN is left to the weighting, which says what it does with it.
    return not bool(error > (_HALF_TOLERANCE if half else _TOLERANCE) * size)


class Probe:
    """Remembers for which kinds of graph the check was made, and what it showed."""

    def __init__(self) -> None:
        self._known: dict[Hashable, frozenset[Hashable]] = {}

    def mixed(self, kind: Hashable) -> frozenset[Hashable] | None:
        """Places where samples mix, or None if this kind of graph was not checked yet."""
        return self._known.get(kind)

    def remember(self, kind: Hashable, mixed: frozenset[Hashable]) -> None:
        """Store the result of a check."""
        self._known[kind] = mixed
