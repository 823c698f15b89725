"""What the scalarizers that look at distances from an ideal point share."""

from __future__ import annotations

import torch
from torch import Tensor

from jdcore.errors import ParameterError


def above(losses: Tensor, reference: Tensor | None) -> Tensor:
    """The losses [m], measured from a reference [m], or from zero."""
    return losses if reference is None else losses - reference.detach().to(losses.dtype)


def preferred(losses: Tensor, vector: Tensor | None) -> Tensor:
    """A preference vector [m] in the dtype of the losses, equal ones where there is none."""
    if vector is None:
        return torch.full_like(losses.detach(), 1.0 / len(losses))
    return vector.detach().to(losses.dtype)


def unit_of(vector: Tensor) -> Tensor:
    """The largest absolute entry, without its gradient; one for a vector of zeros."""
    largest = vector.detach().abs().amax()
    return torch.where(largest == 0.0, 1.0, largest)


def length(vector: Tensor) -> Tensor:
    """Norm of a vector, whose squares may leave the range; the gradient at zero is zero."""
    unit = unit_of(vector)
    # Torch takes the gradient of the norm of a zero vector to be zero, where sqrt would give NaN.
    norm: Tensor = unit * torch.linalg.vector_norm(vector / unit)
    return norm


def direction(preferences: Tensor) -> Tensor:
    """
    Preferences [m] scaled to length 1.

    :raises ParameterError: If they are all zero.
    """
    if not bool(preferences.any()):
        raise ParameterError("pref_vector", "a direction, not zero", preferences.tolist())
    scaled = preferences / preferences.abs().amax()
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled)
    return unit
