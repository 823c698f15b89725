from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def permutations(count: int, length: int, generator: torch.Generator | None) -> NDArray[np.int64]:
    """
    Independent random permutations of 0, ..., length - 1, drawn one after the other.

    :param generator: Source of the random numbers; the default generator of torch if None.
    :returns: Array [count, length].
    """
    device = "cpu" if generator is None else generator.device
    drawn = np.empty((count, length), dtype=np.int64)
    for permutation in drawn:
        order = torch.randperm(length, generator=generator, device=device)
        permutation[:] = order.numpy() if order.is_cpu else order.cpu().numpy()
    return drawn


def summed_rows(
    coefficients: NDArray[np.float64],
    norms: NDArray[np.float64],
    inverses: NDArray[np.float64],
) -> NDArray[np.float64]:
    """
    Weights of the sum of modified rows.

    :param coefficients: Row i holds the modified row i, divided by its original norm, as a
        combination of the rows of length 1. Array [m, m].
    :param norms: Norms of the rows [m].
    :param inverses: Inverses of the norms, 0 for zero rows [m].
    :returns: Weights [m]; zero rows are not modified, so theirs is 1.
    """
    return np.where(norms > 0.0, (norms @ coefficients) * inverses, 1.0)
