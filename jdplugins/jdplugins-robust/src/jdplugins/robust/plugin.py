"""What this distribution provides. Imports neither torch nor any method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdcore import AggregatorSpec, Property, Reference, hookimpl

_PACKAGE = "jdplugins.robust"
_ROBUST = (Property.SCALE_EQUIVARIANT, Property.ROBUST)
_INVARIANT = (Property.PERMUTATION_INVARIANT, *_ROBUST)


def _arxiv(title: str, year: int, number: str) -> Reference:
    return Reference(title=title, year=year, url=f"https://arxiv.org/pdf/{number}")


def _method(
    name: str, class_name: str, summary: str, reference: Reference, **more: Any
) -> AggregatorSpec:
    """The spec of a method, whose module has its name."""
    kind = "weighting" if class_name.endswith("Weighting") else "aggregator"
    factory: dict[str, Any] = {kind: f"{_PACKAGE}.{name}:{class_name}"}
    return AggregatorSpec(
        name=name, summary=summary, reference=reference, api_version=1, **factory, **more
    )


def _one_bad_row(m: int) -> dict[str, Any]:
    del m
    return {"n_byzantine": 1}


def _around_the_median(**arguments: Any) -> dict[str, Any]:
    # Imported here, so that listing does without.
    from jdplugins.robust.coordinate_wise_median import CoordinateWiseMedian

    return {"aggregator": CoordinateWiseMedian(), **arguments}


@hookimpl
def jdcore_aggregators() -> Iterator[AggregatorSpec]:
    yield _method(
        "coordinate_wise_median",
        "CoordinateWiseMedian",
        "Median of each coordinate.",
        Reference(
            title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            year=2018,
            url="https://proceedings.mlr.press/v80/yin18a/yin18a.pdf",
        ),
        properties=_INVARIANT,
    )
    yield _method(
        "geometric_median",
        "GeometricMedianWeighting",
        "Vector with the least sum of distances to all rows.",
        _arxiv("Robust Aggregation for Federated Learning", 2019, "1912.13445"),
        properties=_INVARIANT,
    )
    yield _method(
        "multi_krum",
        "MultiKrumWeighting",
        "Mean of all rows but those farthest from their neighbours.",
        Reference(
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
    )
    yield _method(
        "centered_clipping",
        "CenteredClipping",
        "Mean of the rows, each clipped to a ball around the previous update.",
        _arxiv("Learning from History for Byzantine Robust Optimization", 2021, "2012.10333"),
        properties=(Property.PERMUTATION_INVARIANT,),
        stateful=True,
        example=lambda m: {"tau": 5.0},
    )
    yield _method(
        "mda",
        "MDAWeighting",
        "Mean of the rows that are closest together, all but the given number.",
        _arxiv("Genuinely Distributed Byzantine Machine Learning", 2019, "1905.03853"),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
    )
    yield _method(
        "meamed",
        "MeaMed",
        "Mean of the entries of each coordinate that are closest to its median.",
        _arxiv("Generalized Byzantine-tolerant SGD", 2018, "1802.10116"),
        properties=_INVARIANT,
        min_rows=3,
        example=_one_bad_row,
    )
    yield _method(
        "monna",
        "MoNNAWeighting",
        "Mean of the rows closest to one row that is trusted.",
        _arxiv("Robust Collaborative Learning with Linear Gradient Overhead", 2023, "2209.10931"),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
    )
    yield _method(
        "smea",
        "SMEAWeighting",
        "Mean of the set of rows whose largest variance is the smallest.",
        _arxiv(
            "On the Privacy-Robustness-Utility Trilemma in Distributed Learning", 2023, "2302.04787"
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
    )
    yield _method(
        "caf",
        "CAFWeighting",
        "Mean in which rows lose weight that stand out where variance is largest.",
        _arxiv(
            "Towards Trustworthy Federated Learning with Untrusted Participants", 2025, "2505.01874"
        ),
        properties=_ROBUST,
        min_rows=3,
        example=_one_bad_row,
    )
    yield _method(
        "nnm",
        "NNM",
        "Each row replaced by the mean of the rows closest to it, before another method.",
        _arxiv(
            "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
            2023,
            "2302.01772",
        ),
        properties=_ROBUST,
        wrapper=True,
        stateful=True,
        min_rows=3,
        example=lambda m: _around_the_median(n_byzantine=1),
    )
    yield _method(
        "bucketing",
        "Bucketing",
        "Rows averaged in random buckets, before another method.",
        _arxiv(
            "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", 2022, "2006.09365"
        ),
        properties=_ROBUST,
        wrapper=True,
        stateful=True,
        stochastic=True,
        example=lambda m: _around_the_median(),
    )
    yield _method(
        "clipping",
        "Clipping",
        "Rows clipped to a given norm, before another method.",
        _arxiv("On the Difficulty of Training Recurrent Neural Networks", 2013, "1211.5063"),
        properties=(Property.PERMUTATION_INVARIANT,),
        wrapper=True,
        stateful=True,
        example=lambda m: _around_the_median(max_norm=5.0),
    )
    yield _method(
        "arc",
        "ARC",
        "The longest rows clipped to the norm of the next one, before another method.",
        _arxiv("Adaptive Gradient Clipping for Robust Federated Learning", 2024, "2405.14432"),
        properties=_INVARIANT,
        wrapper=True,
        stateful=True,
        min_rows=3,
        example=lambda m: _around_the_median(n_byzantine=1),
    )
