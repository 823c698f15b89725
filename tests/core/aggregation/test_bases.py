"""What base classes say to those who derive from them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
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


def test_classes_of_methods_are_let_go() -> None:
    # As of a cell of a notebook that runs again.
    def step() -> list[ref[type]]:
        @define(eq=False)
        class Last(StateFields, GramianWeighting):
            calls: int = state_field(int)

            def compute(self, gramian: Any) -> Any:
                self.calls += 1
                return np.eye(len(gramian))[-1]

            def compute_there(self, gramian: Tensor) -> None:
                return None

        class Plain:
            def __call__(self, gramian: Tensor) -> Tensor:
                return gramian.diagonal()

        @define(eq=False)
        class First(ScalarizationWeighting):
            def compute(self, m: int, dtype: torch.dtype) -> Tensor:
                return torch.eye(m, dtype=dtype)[0]

        for m in (2, 128):
            aggregators = [GramianAggregator(made()) for made in (Last, Plain, First)]
            assert all(aggregator(torch.eye(m)).isfinite().all() for aggregator in aggregators)
        return [ref(Last), ref(Plain), ref(First)]

    classes = step()
    gc.collect()
    assert [kept() for kept in classes] == [None, None, None]
