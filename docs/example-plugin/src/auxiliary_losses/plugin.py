"""What this distribution provides. Imports no method, so that listing stays fast."""

from __future__ import annotations

from collections.abc import Iterator

from jdcore import AggregatorSpec, Property, Reference, hookimpl


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield AggregatorSpec(
        name="gradient_similarity",
        summary="The main row, plus every other row weighted by its cosine with it if positive.",
        weighting="auxiliary_losses.gradient_similarity:GradientSimilarityWeighting",
        reference=Reference(
            title="Adapting Auxiliary Losses Using Gradient Similarity",
            year=2018,
            url="https://arxiv.org/pdf/1812.02224",
        ),
        properties=(Property.LINEAR_UNDER_SCALING, Property.SCALE_EQUIVARIANT),
        api_version=1,
    )
