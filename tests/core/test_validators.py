"""What validators accept, and what they say of all else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward
from jdcore.validators import check_matrix, generator, integer, one_of, real, row_vector


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


@define(eq=False)
class Chosen:
    count: int = field(default=1, validator=integer(1))
    mode: str = field(default="min", validator=one_of("min", "max"))
    weights: Tensor | None = field(default=None, validator=row_vector)
    generator: torch.Generator | None = field(default=None, validator=generator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 2**63}, "`count` must be <= 9223372036854775807, got 9223372036854775808"),
        ({"count": 10**400}, "`count` must be <= 9223372036854775807, got an integer of 1329 bits"),
        ({"generator": 3}, "`generator` must be a torch.Generator or None, got 3"),
        ({"mode": np.ones(2)}, "`mode` must be one of 'min', 'max', got array"),
        ({"mode": ["min"]}, "`mode` must be one of 'min', 'max', got \\['min'\\]"),
        ({"weights": torch.ones(2).to_sparse()}, "`weights` must be .*, got a sparse_coo float32"),
        (
            {"weights": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)},
            "`weights` must be .*, got a nested float32 Tensor",
        ),
        (
            {"weights": torch.tensor([1.0, torch.nan])},
            r"`weights` must be a finite .*, got \[1.0, nan\]",
        ),
        (
            {"weights": torch.ones(2, 1)},
            r"`weights` must be .*, got a float32 Tensor of shape \[2, 1\]",
        ),
        ({"weights": torch.ones(2).to(torch.float8_e5m2)}, "`weights` must be .*, got a float8"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Chosen(**arguments)


def test_devices_without_float64_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def weighting(gramian: Tensor) -> Tensor:
        return gramian[0]

    matrix, layer = torch.ones(2, 3), nn.Linear(2, 2)
    losses = layer(torch.ones(2))
    monkeypatch.setattr(Tensor, "is_mps", True, raising=False)
    monkeypatch.setattr(Tensor, "is_cpu", False, raising=False)
    for call in (
        lambda: check_matrix(matrix),
        lambda: backward(list(losses)),
        lambda: gramian_backward(list(losses), weighting),
        lambda: Engine(layer, batch_dim=None).backward(losses, weighting),
    ):
        with pytest.raises(ParameterError, match=r"a device with float64.* got a Tensor on mps"):
            call()
    assert layer.weight.grad is None
