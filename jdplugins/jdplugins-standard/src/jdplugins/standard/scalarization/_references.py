"""What the scalarizers that look at distances from an ideal point share."""

from __future__ import annotations

import torch
from torch import Tensor


def above(losses: Tensor, reference: Tensor | None) -> Tensor:
    """The losses [m], measured from a reference [m], or from zero."""
    return losses if reference is None else losses - reference.detach().to(losses.dtype)


def preferred(losses: Tensor, vector: Tensor | None) -> Tensor:
    """A preference vector [m] in the dtype of the losses, equal ones where there is none."""
    if vector is None:
        return torch.full_like(losses.detach(), 1.0 / len(losses))
    return vector.detach().to(losses.dtype)
