"""What adversarial workers send: attacks of the literature, as functions of the honest rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attack = Callable[[Tensor, int], Tensor]


def sign_flipping(honest: Tensor, count: int) -> Tensor:
    """The negated mean of the honest rows, ten times as long."""
    return (-10.0 * honest.mean(0)).expand(count, -1)


def a_little_is_enough(honest: Tensor, count: int) -> Tensor:
    """
    The mean of the honest rows, moved by as many standard deviations as still pass for noise.

    https://arxiv.org/pdf/1902.06156: z is the quantile at which the adversaries and just enough
    honest workers to be a majority lie on one side.
    """
    m = len(honest) + count
    supporters = m // 2 + 1 - count
    share = torch.tensor((len(honest) - supporters) / len(honest), dtype=torch.float64)
    z = torch.special.ndtri(share.clamp(0.5, 0.999))
    return (honest.mean(0) - z * honest.std(0)).expand(count, -1)


def inner_product(honest: Tensor, count: int) -> Tensor:
    """
    A small vector against the mean, so that the average points away from it.

    https://arxiv.org/pdf/1903.03936.
    """
    return (-1.1 * len(honest) / count * honest.mean(0)).expand(count, -1)


def far_away(honest: Tensor, count: int) -> Tensor:
    """Huge rows in random directions."""
    generator = torch.Generator().manual_seed(0)
    return 1e12 * torch.randn(count, honest.shape[1], generator=generator, dtype=honest.dtype)


def mimic(honest: Tensor, count: int) -> Tensor:
    """Copies of one honest row, which add weight to it: https://arxiv.org/pdf/2006.09365."""
    return honest[:1].expand(count, -1)


ATTACKS: tuple[Attack, ...] = (sign_flipping, a_little_is_enough, inner_product, far_away, mimic)
