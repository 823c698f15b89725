"""What validators accept, and what they say of all else."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import define, field

from jdcore import ParameterError, ParameterTypeError
from jdcore.validators import real


@define
class Bounded:
    part: float = field(default=0.5, validator=real(0.0, below=1.0))
    share: float = field(default=0.5, validator=real(0.0, 1.0))
    size: float = field(default=0.5, validator=real(0.0))


@pytest.mark.parametrize("arguments", [{"part": 0.0}, {"share": 1.0}, {"size": 1e300}, {"size": 3}])
def test_numbers_up_to_the_bounds_are_accepted(arguments: dict[str, Any]) -> None:
    Bounded(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": 1.0}, r"`part` must be in \[0.0, 1.0\), got 1.0"),
        ({"part": -0.5}, r"`part` must be in \[0.0, 1.0\), got -0.5"),
        ({"part": float("nan")}, r"`part` must be in \[0.0, 1.0\), got nan"),
        ({"share": 1.5}, r"`share` must be in \[0.0, 1.0\], got 1.5"),
        ({"size": float("inf")}, "`size` must be >= 0.0 and finite, got inf"),
        ({"size": 10**400}, "`size` must be >= 0.0 and finite, got an integer of 1329 bits"),
    ],
)
def test_other_numbers_are_refused_with_their_bounds(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        Bounded(**arguments)


@pytest.mark.parametrize("value", [True, "0.5", None, 1j])
def test_what_is_no_real_number_is_refused(value: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`part` must be a real number"):
        Bounded(part=value)
