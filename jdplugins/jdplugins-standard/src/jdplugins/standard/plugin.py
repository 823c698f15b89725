"""What this distribution provides. Imports neither torch nor any method."""

from __future__ import annotations

from collections.abc import Iterator

from jdcore import AggregatorSpec, Property, hookimpl

_PACKAGE = "jdplugins.standard"


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield AggregatorSpec(
        name="mean",
        summary="Mean of the rows: gradient descent on the mean of the losses.",
        weighting=f"{_PACKAGE}.mean:MeanWeighting",
        properties=(
            Property.LINEAR_UNDER_SCALING,
            Property.STRONGLY_STATIONARY,
            Property.PERMUTATION_INVARIANT,
            Property.SCALE_EQUIVARIANT,
            Property.DIFFERENTIABLE,
        ),
        api_version=1,
    )
