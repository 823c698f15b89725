"""Fields that several scalarizers have."""

from __future__ import annotations

from typing import Any

import torch
from attrs import Attribute
from torch import Tensor

from jdcore.aggregation import state_field
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor, real


def positive(instance: object, attribute: Attribute[float], value: float) -> None:
    """Attrs validator: a finite number above zero."""
    real(0.0)(instance, attribute, value)
    if not value:
        raise ParameterError(attribute.name, "> 0", value)


def vector_state() -> Any:
    """State of one number for each loss, none at first."""
    return state_field(nothing, validator=_vector)


def nothing() -> Tensor:
    """The state before the first call."""
    return torch.zeros(0, dtype=torch.float64, device="cpu")


def require_as_many(known: Tensor, m: int) -> None:
    """
    Refuse another number of losses than the state is of.

    :param known: State of one number for each loss, empty before the first call.
    :raises ParameterError: If it is not empty and not of m numbers.
    """
    if len(known) not in (0, m):
        raise ParameterError(
            "losses",
            f"{len(known)} values, as in the calls before",
            f"{m}",
            "Call reset() before the number of losses changes.",
        )


def _vector(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if value.ndim != 1:
        raise ParameterError(attribute.name, "a vector", describe_tensor(value))
