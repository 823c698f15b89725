"""What base classes say to those who derive from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor

from jdcore import ParameterError
from jdcore.aggregation import (
    CoordinatewiseAggregator,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    HistoryAggregator,
    LossWeighting,
    RowMixing,
    ScalarizationWeighting,
    StateFields,
    WeightingWrapper,
    state_field,
    weigh,
)
from jdcore.scalarization import LossScalarizer


@pytest.mark.parametrize(
    ("base", "method", "call"),
    [
        (GramianWeighting, "compute", lambda weighting: weighting(torch.eye(2))),
        (ScalarizationWeighting, "compute", lambda weighting: weighting(torch.eye(2))),
        (LossWeighting, "compute_with", lambda w: w(torch.eye(2), losses=torch.ones(2))),
        (CoordinatewiseAggregator, "compute", lambda aggregator: aggregator(torch.eye(2))),
        (HistoryAggregator, "advance", lambda aggregator: aggregator(torch.eye(2))),
        (partial(WeightingWrapper, torch.diag), "rewrite", lambda w: w(torch.eye(2))),
        (partial(RowMixing, torch.sum), "mix", lambda aggregator: aggregator(torch.eye(2))),
        (LossScalarizer, "scalarize", lambda scalarizer: scalarizer(torch.ones(2))),
    ],
)
def test_a_base_class_names_what_a_subclass_has_to_implement(
    base: Callable[[], Any], method: str, call: Callable[[Any], Any]
) -> None:
    owner = base()
    with pytest.raises(NotImplementedError, match=f"{type(owner).__name__} .* `{method}`"):
        call(owner)


def test_weights_as_an_array_are_refused_with_the_way_to_a_tensor() -> None:
    with pytest.raises(ParameterError, match=r"torch\.as_tensor"):
        GramianAggregator(lambda gramian: gramian.diagonal().numpy())(torch.eye(2))


def test_a_wrapper_takes_back_the_step_of_what_it_wraps_where_nobody_looked_at_broken_rows() -> (
    None
):
    @define(eq=False)
    class Growing(StateFields, ScalarizationWeighting):
        calls: int = state_field(int)

        def compute(self, m: int, dtype: torch.dtype) -> Tensor:
            self.calls += 1
            return torch.full((m,), float(self.calls), dtype=dtype)

    class Half(WeightingWrapper):
        def rewrite(self, source: GramianSource) -> Tensor:
            return 0.5 * weigh(self.weighting, source)

    aggregator = GramianAggregator(Half(Growing()))
    assert aggregator(torch.eye(2)).tolist() == [0.5, 0.5]
    assert aggregator(torch.full((2, 2), math.nan)).isnan().all()
    assert aggregator(torch.eye(2)).tolist() == [1.0, 1.0]
