from __future__ import annotations

import math

from torch import Tensor


def as_matrix(jacobian: Tensor) -> Tensor:
    """View a Jacobian of shape ``[m, *S]`` as a matrix [m, n]; S may be empty or hold zeros."""
    shape = jacobian.shape
    return jacobian.reshape(shape[0], math.prod(shape[1:]))
