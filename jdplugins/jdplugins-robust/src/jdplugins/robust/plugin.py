"""What this distribution provides. Imports neither torch nor any method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdcore import AggregatorSpec, Property, Reference, hookimpl

_PACKAGE = "jdplugins.robust"
_ROBUST = (Property.SCALE_EQUIVARIANT, Property.ROBUST)
_INVARIANT = (Property.PERMUTATION_INVARIANT, *_ROBUST)


def _one_bad_row(m: int) -> dict[str, Any]:
    del m
    return {"n_byzantine": 1}


def _around_the_median(**arguments: Any) -> dict[str, Any]:
    # Imported here, so that listing does without.
    from jdplugins.robust.coordinate_wise_median import CoordinateWiseMedian

    return {"aggregator": CoordinateWiseMedian(), **arguments}


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield from _rules()
    yield from _wrappers()


def _rules() -> Iterator[AggregatorSpec]:
    yield AggregatorSpec(
        name="coordinate_wise_median",
        summary="Median of each coordinate.",
        aggregator=f"{_PACKAGE}.coordinate_wise_median:CoordinateWiseMedian",
        reference=Reference(
            title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            year=2018,
            url="https://proceedings.mlr.press/v80/yin18a/yin18a.pdf",
        ),
        properties=_INVARIANT,
        api_version=1,
    )
    yield AggregatorSpec(
        name="geometric_median",
        summary="Vector with the least sum of distances to all rows.",
        weighting=f"{_PACKAGE}.geometric_median:GeometricMedianWeighting",
        reference=Reference(
            title="Robust Aggregation for Federated Learning",
            year=2019,
            url="https://arxiv.org/pdf/1912.13445",
        ),
        properties=_INVARIANT,
        api_version=1,
    )
    yield AggregatorSpec(
        name="multi_krum",
        summary="Mean of all rows but those farthest from their neighbours.",
        weighting=f"{_PACKAGE}.multi_krum:MultiKrumWeighting",
        reference=Reference(
            title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            year=2017,
            url=(
                "https://proceedings.neurips.cc/paper/2017/file/"
                "f4b9ec30ad9f68f89b29639786cb62ef-Paper.pdf"
            ),
        ),
        properties=_ROBUST,
        min_rows=4,
        example=_one_bad_row,
        api_version=1,
    )
    yield AggregatorSpec(
        name="centered_clipping",
        summary="Mean of the rows, each clipped to a ball around the previous update.",
        aggregator=f"{_PACKAGE}.centered_clipping:CenteredClipping",
        reference=Reference(
            title="Learning from History for Byzantine Robust Optimization",
            year=2021,
            url="https://arxiv.org/pdf/2012.10333",
        ),
        properties=(Property.PERMUTATION_INVARIANT,),
        stateful=True,
        example=lambda m: {"tau": 5.0},
        api_version=1,
    )
    yield AggregatorSpec(
        name="mda",
        summary="Mean of the rows that are closest together, all but the given number.",
        weighting=f"{_PACKAGE}.mda:MDAWeighting",
        reference=Reference(
            title="Genuinely Distributed Byzantine Machine Learning",
            year=2019,
            url="https://arxiv.org/pdf/1905.03853",
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
        api_version=1,
    )
    yield AggregatorSpec(
        name="meamed",
        summary="Mean of the entries of each coordinate that are closest to its median.",
        aggregator=f"{_PACKAGE}.meamed:MeaMed",
        reference=Reference(
            title="Generalized Byzantine-tolerant SGD",
            year=2018,
            url="https://arxiv.org/pdf/1802.10116",
        ),
        properties=_INVARIANT,
        min_rows=3,
        example=_one_bad_row,
        api_version=1,
    )
    yield AggregatorSpec(
        name="monna",
        summary="Mean of the rows closest to one row that is trusted.",
        weighting=f"{_PACKAGE}.monna:MoNNAWeighting",
        reference=Reference(
            title="Robust Collaborative Learning with Linear Gradient Overhead",
            year=2023,
            url="https://arxiv.org/pdf/2209.10931",
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
        api_version=1,
    )
    yield AggregatorSpec(
        name="smea",
        summary="Mean of the set of rows whose largest variance is the smallest.",
        weighting=f"{_PACKAGE}.smea:SMEAWeighting",
        reference=Reference(
            title="On the Privacy-Robustness-Utility Trilemma in Distributed Learning",
            year=2023,
            url="https://arxiv.org/pdf/2302.04787",
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
        api_version=1,
    )
    yield AggregatorSpec(
        name="caf",
        summary="Mean in which rows lose weight that stand out where variance is largest.",
        weighting=f"{_PACKAGE}.caf:CAFWeighting",
        reference=Reference(
            title="Towards Trustworthy Federated Learning with Untrusted Participants",
            year=2025,
            url="https://arxiv.org/pdf/2505.01874",
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
        api_version=1,
    )


def _wrappers() -> Iterator[AggregatorSpec]:
    yield AggregatorSpec(
        name="nnm",
        summary="Each row replaced by the mean of the rows closest to it, before another method.",
        aggregator=f"{_PACKAGE}.nnm:NNM",
        reference=Reference(
            title="Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
            year=2023,
            url="https://arxiv.org/pdf/2302.01772",
        ),
        properties=_ROBUST,
        wrapper=True,
        stateful=True,
        min_rows=3,
        example=lambda m: _around_the_median(n_byzantine=1),
        api_version=1,
    )
    yield AggregatorSpec(
        name="bucketing",
        summary="Rows averaged in random buckets, before another method.",
        aggregator=f"{_PACKAGE}.bucketing:Bucketing",
        reference=Reference(
            title="Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
            year=2022,
            url="https://arxiv.org/pdf/2006.09365",
        ),
        properties=_ROBUST,
        wrapper=True,
        stateful=True,
        stochastic=True,
        example=lambda m: _around_the_median(),
        api_version=1,
    )
    yield AggregatorSpec(
        name="clipping",
        summary="Rows clipped to a given norm, before another method.",
        aggregator=f"{_PACKAGE}.clipping:Clipping",
        reference=Reference(
            title="On the Difficulty of Training Recurrent Neural Networks",
            year=2013,
            url="https://arxiv.org/pdf/1211.5063",
        ),
        properties=(Property.PERMUTATION_INVARIANT,),
        wrapper=True,
        stateful=True,
        example=lambda m: _around_the_median(max_norm=5.0),
        api_version=1,
    )
    yield AggregatorSpec(
        name="arc",
        summary="The longest rows clipped to the norm of the next one, before another method.",
        aggregator=f"{_PACKAGE}.arc:ARC",
        reference=Reference(
            title="Adaptive Gradient Clipping for Robust Federated Learning",
            year=2024,
            url="https://arxiv.org/pdf/2405.14432",
        ),
        properties=_INVARIANT,
        wrapper=True,
        stateful=True,
        min_rows=3,
        example=lambda m: _around_the_median(n_byzantine=1),
        api_version=1,
    )
