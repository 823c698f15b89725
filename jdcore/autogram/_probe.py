"""
The check that samples stay apart, which everything with a ``batch_dim`` rests on.

Weighing the losses of sample b by s_b must scale the gradients of sample b, and only these, by s_b.
One backward pass shows it for every layer at once. Powers of two as weights make the comparison
exact up to what little a differently ordered sum may change.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from attrs import frozen
from torch import Tensor

_HALF_TOLERANCE = 1e-2
_TOLERANCE = 1e-4


def probe_weights(samples: int) -> Tensor:
    """Weights 1 and 2 for the samples [B], in an order that no layout repeats."""
    bits = torch.randint(
        2, (samples,), generator=torch.Generator().manual_seed(20240623), device="cpu"
    )
    bits[0], bits[-1] = 0, 1
    return 1.0 + bits


@frozen
class Finding:
    """
    Where the samples are at one place.

    :param layout: "major", "minor" or "second" (see :mod:`jdcore.autogram.rules._direct`), or None
        if samples mix.
    :param sure: Whether the gradients were such that nothing else explains them. A first batch may
        hide a layout: behind a layer that starts at zero all gradients are zero, and scale any way.
    :param ambiguous: Whether several layouts explain them, which differ in what is whose.
    """

    layout: str | None
    sure: bool
    ambiguous: bool = False


def find_layout(grads: Tensor, probed: Tensor, weights: Tensor) -> Finding:
    """
    Find the layout in which the gradients of each sample were scaled by its own weight.

    :param grads: Gradients of the unweighted losses.
    :param probed: Gradients of the weighted losses.
    :param weights: Shape [B].
    """
    half = grads.dtype in (torch.float16, torch.bfloat16)
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    weights = weights.to(device=grads.device, dtype=torch.float32 if half else grads.dtype)

    def explains(scale: Tensor | float) -> bool:
        return _equal(probed, grads * scale, tolerance)

    scales = _scales(grads, weights)
    fitting = [name for name, scale in scales.items() if explains(scale)]
    if not fitting:
        return Finding(None, sure=True)
    first = scales[fitting[0]].expand_as(grads)
    same = all(torch.equal(first, scales[name].expand_as(grads)) for name in fitting[1:])
    shown = same and not explains(1.0) and not explains(2.0)
    return Finding(fitting[0], sure=shown, ambiguous=not same and bool(grads.any()))


def _scales(grads: Tensor, weights: Tensor) -> dict[str, Tensor]:
    B = len(weights)
    scales = {}
    if grads.ndim > 0 and grads.shape[0] % B == 0:
        repeats = grads.shape[0] // B
        rest = (1,) * (grads.ndim - 1)
        scales["major"] = weights.repeat_interleave(repeats).view(-1, *rest)
        scales["minor"] = weights.repeat(repeats).view(-1, *rest)
    if grads.ndim > 2 and grads.shape[1] == B:
        scales["second"] = weights.view(-1, *(1,) * (grads.ndim - 2))
    return scales


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
