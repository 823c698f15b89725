"""What methods of subclasses return: refused by name where it is of another kind or shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jdcore import ParameterError
from jdcore.aggregation import (
    CoordinatewiseAggregator,
    GramianAggregator,
    GramianWeighting,
    HistoryAggregator,
    InformedAggregator,
    MatrixAggregator,
    RowMixing,
    WeightingWrapper,
)

J = torch.tensor([[1.0, 2.0], [0.0, 1.0], [4.0, 0.0]])


def ones(gramian: Tensor) -> Tensor:
    return torch.ones(len(gramian))


def subclass(base: Any, *given: Any, **methods: Callable[..., Any]) -> Any:
    bound = {name: (lambda self, *a, f=f: f(*a)) for name, f in methods.items()}
    return type("Sub", (base,), bound)(*given)


def weighting(answer: object) -> Any:
    return GramianAggregator(subclass(GramianWeighting, compute=lambda gramian: answer))


def history(advance: Callable[..., Any], weigh_rows: Callable[..., Any]) -> Any:
    return subclass(HistoryAggregator, advance=advance, weigh_rows=weigh_rows)


ARRAYS = {
    "reversed": np.arange(3.0)[::-1],
    "a reversed row": np.ones(3)[::-1],
    "broadcast": np.broadcast_to(2.0, (3,)),
    "big-endian": np.ones(3, ">f8"),
    "integers": np.arange(3),
    "a list": [1.0, 2.0, 3.0],
    "a tensor": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_weights_may_be_any_array_of_real_numbers(kind: str) -> None:
    answer = ARRAYS[kind]
    plain = answer.detach().tolist() if isinstance(answer, Tensor) else list(answer)

    torch.testing.assert_close(weighting(answer)(J), torch.tensor(plain, dtype=J.dtype) @ J)


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (weighting(None), r"`compute` must be .* a real array \[3\], got a NoneType"),
        (weighting(np.ones(3) * 1j), r"`compute` must be .* an array of complex128 of shape \[3\]"),
        (weighting("abc"), "`compute` must be .* got a str"),
        (
            GramianAggregator(subclass(WeightingWrapper, ones, rewrite=lambda source: [1.0] * 3)),
            r"`weighting` must be one that returns real weights of shape \[3\], got a list",
        ),
        (
            subclass(RowMixing, GramianAggregator(ones), mix=lambda source: np.ones((2, 2))),
            r"`mix` must be .* a real array \[k, 3\], got an array of float64 of shape \[2, 2\]",
        ),
        (
            subclass(CoordinatewiseAggregator, compute=lambda columns: columns[0, :1]),
            r"`aggregator` must be .* vectors of shapes \[\(2,\)\], got shapes \[\(1,\)\]",
        ),
        (
            subclass(MatrixAggregator, aggregate_finite=lambda columns: columns.blocks[0][0]),
            "`aggregator` must be .* got shapes a float32 Tensor",
        ),
        (
            subclass(InformedAggregator, aggregate_parts=lambda columns, losses: [J[0]]),
            "`aggregate_parts` must be a method that returns a list of vectors, and weights",
        ),
        (
            history(lambda rows, past, losses: rows[0], lambda *_: (torch.ones(3), {})),
            r"`advance` must be a method that returns a Tensor of shape \[3, 2\], got .* \[2\]",
        ),
        (
            history(lambda rows, past, losses: rows, lambda *_: torch.ones(3)),
            "`weigh_rows` must be a method that returns weights, and a dictionary of state",
        ),
        (
            history(lambda rows, past, losses: rows, lambda *_: (torch.ones(2), {})),
            r"returns real weights of shape \[3\], got a float32 Tensor of shape \[2\]",
        ),
    ],
)
def test_anything_else_is_refused_by_the_name_of_the_method(aggregator: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        aggregator(J)


def test_portions_of_columns_are_not_broadcast() -> None:
    aggregator = subclass(CoordinatewiseAggregator, compute=lambda columns: columns[0, :1])

    with pytest.raises(ParameterError, match="real vectors of shapes"):
        aggregator(torch.ones(2, 200_000))
