from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from jdcore.aggregation._columns import Columns
from jdcore.aggregation._observation import Observation, observed, unobserved
from jdcore.aggregation._source import GramianSource

Result = tuple[list[Tensor], Tensor | None]


def watched(method: Any, columns: Columns, aggregate: Callable[[], Result]) -> Result:
    """
    Aggregate by a method that is no weighting, and tell the observers of this context.

    :param method: The aggregator that observers hear of; what it calls in turn is not observed.
    :param columns: The Jacobian, of at least one row.
    :param aggregate: Makes the vectors of the blocks, and the weights [m] or None.
    :returns: What ``aggregate`` returns.
    """
    if not observed():
        return aggregate()
    with unobserved() as observers:
        start = perf_counter()
        vectors, weights = aggregate()
        seconds = perf_counter() - start
        source = GramianSource.of_columns(columns)
        update = partial(columns.inner, vectors)
        for observer in observers:
            observer(Observation(method, source, weights, update, seconds))
    return vectors, weights
