"""Weights in the simplex: what is nearest to a vector, and gradient steps among them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from attrs import Attribute
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import state_field
from jdcore.errors import ParameterError


def project_onto_simplex(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """
    The weights ``w >= 0`` of sum 1 that are nearest to a vector.

    :param vector: Array [m], m >= 1; entries may be minus infinity.
    """
    # No entry further than 1 below the largest gets a weight. The margin keeps rounding from giving
    # it one.
    vector = np.maximum(vector - vector.max(), -2.0)
    descending = np.sort(vector)[::-1]
    excess = (np.cumsum(descending) - 1.0) / np.arange(1, len(vector) + 1)
    threshold = excess[np.flatnonzero(descending > excess)[-1]]
    weights: NDArray[np.float64] = np.maximum(vector - threshold, 0.0)
    return weights


def descend(
    vector: NDArray[np.float64], gradient: NDArray[np.float64], rate: float
) -> NDArray[np.float64]:
    """
    ``vector - rate * gradient`` up to a multiple of ones, which no map onto the simplex sees.

    :param vector: Array [m].
    :param gradient: Array [m].
    :param rate: Step size >= 0, also infinite; entries of the result may be minus infinity.
    """
    with np.errstate(over="ignore"):
        # An infinite rate times zero would be NaN.
        above = (gradient - gradient.min()) * min(rate, sys.float_info.max)
        result: NDArray[np.float64] = vector - above
    return result


def softmax(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """
    Weights proportional to the exponentials of a vector.

    :param vector: Array [m], m >= 1; entries may be minus infinity, but not all.
    """
    weights: NDArray[np.float64] = np.exp(vector - vector.max())
    weights /= weights.sum()
    return weights


def no_weights() -> Tensor:
    """The state of a method that keeps weights before its first call."""
    return torch.zeros(0, dtype=torch.float64, device="cpu")


def weights_state() -> Any:
    """State of one number for each objective, none of them negative; empty at first."""
    return state_field(no_weights, validator=_not_negative)


def _not_negative(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if bool((value < 0.0).any()):
        raise ParameterError(attribute.name, "free of negative numbers", value.tolist())


def kept_weights(state: Tensor, m: int, parameter: str = "gramian") -> NDArray[np.float64] | None:
    """
    The weights that a method has kept, None before its first call.

    :param state: float64 Tensor [m], or an empty one.
    :param m: Number of objectives of the present call.
    :raises ParameterError: If the state is of another number of objectives.
    """
    known = len(state)
    if not known:
        return None
    if known != m:
        raise ParameterError(
            parameter,
            f"of {known} objectives, as in the calls before",
            f"one of {m}",
            "Call reset() before the number of objectives changes.",
        )
    weights: NDArray[np.float64] = state.numpy().copy()
    return weights


def are_keepable(weights: Tensor, precision: torch.dtype) -> bool:
    """
    Whether weights can be those of later rows, too: of rows of 1e-45, they may be 1e45.

    :param weights: float64 Tensor [m].
    :param precision: The dtype of the rows, in which an update is lost to larger weights.
    """
    largest = torch.finfo(torch.promote_types(precision, torch.float32)).max
    return bool((weights.abs() <= largest).all())
