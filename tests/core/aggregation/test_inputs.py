"""Losses and a second batch: who needs them gets them, and says so where they are missing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray

from jdcore import (
    AggregatorSpec,
    NonFiniteError,
    ParameterError,
    ParameterTypeError,
)
from jdcore.aggregation import (
    Columns,
    CrossGramianWeighting,
    Flattening,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    LossWeighting,
    as_module,
    weigh,
)
from jdcore.aggregation._observation import observing
from jdcore.linalg import cross_gramian

Array = NDArray[np.float64]


@define(eq=False)
class Inverse(LossWeighting):
    def compute_with(self, gramian: Array, losses: Array) -> Array:
        return np.diagonal(gramian) / losses


@define(eq=False)
class RowSums(CrossGramianWeighting):
    def compute(self, gramian: Array) -> Array:
        return gramian.sum(axis=1)


@define(eq=False)
class Diagonal(GramianWeighting):
    def compute(self, gramian: Array) -> Array:
        return np.diagonal(gramian).copy()


J = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
K = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
LOSSES = torch.tensor([0.5, 4.0])


def test_losses_reach_the_weighting_from_every_call() -> None:
    expected = torch.tensor([10.0, 0.5])
    aggregator = GramianAggregator(Inverse())

    assert torch.equal(Inverse()(J @ J.T, losses=LOSSES), expected)
    assert torch.equal(aggregator(J, losses=LOSSES), expected @ J)
    assert torch.equal(aggregator(J, losses=list(LOSSES)), expected @ J)  # type: ignore[arg-type]
    vectors, weights = aggregator.aggregate_blocks([J[:, :1], J[:, 1:]], losses=LOSSES)
    assert torch.equal(torch.cat(vectors), expected @ J)
    assert torch.equal(weights, expected)
    assert torch.equal(as_module(aggregator)(J, losses=LOSSES), expected @ J)
    generalized = (J @ J.T).reshape(2, 1, 1, 2)
    weights = Flattening(Inverse())(generalized, losses=LOSSES[:, None])
    assert torch.equal(weights, expected[:, None])


def test_the_cross_gramian_reaches_the_weighting_from_every_call() -> None:
    expected = (J @ K.T).sum(dim=1)
    aggregator = GramianAggregator(RowSums())

    assert torch.equal(RowSums()(J @ K.T), expected)
    assert torch.equal(aggregator(J, second=K), expected @ J)
    blocks, others = [J[:, :2], J[:, 2:]], [K[:, :2], K[:, 2:]]
    vectors, weights = aggregator.aggregate_blocks(blocks, second=others)
    assert torch.equal(torch.cat(vectors), expected @ J)
    assert torch.equal(weights, expected)


def test_a_second_batch_is_looked_at_by_itself_where_the_first_is_finite() -> None:
    columns = Columns([J], [K.clone().fill_(math.nan)])
    source = GramianSource.of_columns(columns)
    source.array()  # as what wraps a method may

    assert RowSums().weigh(source).isnan().all()
    with pytest.raises(NonFiniteError):
        RowSums(check_finite=True).weigh(source)


def test_who_needs_neither_is_not_disturbed_by_them() -> None:
    aggregator = GramianAggregator(Diagonal())

    assert torch.equal(aggregator(J, losses=LOSSES, second=K), aggregator(J))
    assert torch.equal(Diagonal()(J @ J.T, losses=LOSSES), Diagonal()(J @ J.T))


def test_missing_losses_name_the_calls_that_give_them() -> None:
    message = r"`losses` must be given.*weighting\(gramian, losses=losses\).*jac_to_grad"

    with pytest.raises(ParameterError, match=message):
        Inverse()(J @ J.T)
    with pytest.raises(ParameterError, match=message):
        GramianAggregator(Inverse())(J)


def test_a_missing_second_batch_names_the_calls_that_give_it() -> None:
    message = r"`second` must be given.*second=other_jacobian.*engine\.cross_gramian"

    with pytest.raises(ParameterError, match=message):
        GramianAggregator(RowSums())(J)
    with pytest.raises(ParameterError, match=message):
        weigh(RowSums(), GramianSource.of(J @ J.T))


def test_a_gramian_method_does_not_take_a_cross_gramian_for_a_gramian() -> None:
    with pytest.raises(ParameterError, match="the cross-Gramian of two batches"):
        weigh(Diagonal(), GramianSource.of_cross(J @ K.T))


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (LOSSES[:1], ParameterError, "must be 2 values, one for each objective"),
        (
            torch.tensor([1, 2]),
            ParameterTypeError,
            "a floating Tensor with 2 entries, got an int64",
        ),
        ([0.5, 4.0], ParameterTypeError, "got a list"),
        ([torch.nested.nested_tensor([LOSSES], layout=torch.jagged)], ParameterTypeError, "a list"),
        (LOSSES.to(torch.float8_e4m3fn), ParameterTypeError, "got a float8"),
        (LOSSES.to_sparse(), ParameterTypeError, "got a sparse_coo float"),
        ([loss.to("meta") for loss in LOSSES], ParameterTypeError, "got a list"),
        (3.0, ParameterTypeError, "got a float"),
    ],
)
def test_unusable_losses_are_refused(losses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GramianAggregator(Inverse())(J, losses=losses)
    with pytest.raises(error, match=message):
        Inverse()(J @ J.T, losses=losses)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (K[:1], r"`second` must be of shape \[2, 3\], as the first, got \[1, 3\]"),
        (K[0], "`second` must be a matrix"),
        (K.long(), "`second` must be of a real floating dtype"),
    ],
)
def test_an_unusable_second_batch_is_refused(second: torch.Tensor, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        GramianAggregator(RowSums())(J, second=second)


def test_losses_that_are_not_finite_give_nan_or_an_error_that_names_them() -> None:
    broken = torch.tensor([1.0, math.inf])

    assert Inverse()(J @ J.T, losses=broken).isnan().all()
    with pytest.raises(NonFiniteError, match=r"The values of objectives \[1\]"):
        Inverse(check_finite=True)(J @ J.T, losses=broken)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_cross_gramian_out_of_range_is_one_of_smaller_rows(scale: float) -> None:
    seen: list[float] = []

    @define(eq=False)
    class Scaled(RowSums):
        def compute_from(self, matrix: Array, source: GramianSource) -> Array:
            seen.append(source.scale())
            return self.compute(matrix)

    vector = GramianAggregator(Scaled())(J.double() * scale, second=K.double() * scale)

    assert seen[0] != 1.0
    assert math.log2(seen[0]).is_integer()
    expected = (J @ K.T).sum(dim=1).double() @ J.double() * (scale / seen[0]) ** 2 * scale
    torch.testing.assert_close(vector, expected)


def test_the_cross_gramian_of_long_blocks_is_that_of_the_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 3, 200_000, generator=generator)
    expected = one.double() @ two.double().T

    pieces = [part.split([7, 99_993, 100_000], dim=1) for part in (one, two)]

    torch.testing.assert_close(cross_gramian(one, two), expected)
    torch.testing.assert_close(cross_gramian(*pieces), expected)
    with pytest.raises(ParameterError, match=r"of \[200000\] columns, as the first"):
        cross_gramian(one, two[:, 1:])


def test_nobody_is_told_of_a_weighing_without_a_gramian() -> None:
    seen: list[object] = []

    with observing(seen.append):
        RowSums()(J @ K.T)
        assert not seen
        GramianAggregator(RowSums())(J, second=K)
    assert len(seen) == 1


def test_a_spec_says_what_a_method_looks_at() -> None:
    weighting = AggregatorSpec(
        name="a", summary="A.", weighting="a:AWeighting", losses=True, api_version=1
    )
    crossed = AggregatorSpec(
        name="a", summary="A.", weighting="a:AWeighting", cross_gramian=True, api_version=1
    )

    assert (weighting.input, weighting.losses) == ("gramian", True)
    assert (crossed.input, crossed.losses) == ("cross_gramian", False)
    with pytest.raises(ParameterError, match="`cross_gramian` must be False for a method that"):
        AggregatorSpec(name="a", summary="A.", aggregator="a:A", cross_gramian=True, api_version=1)


@pytest.mark.parametrize("weighting", [Diagonal(), Inverse()])
def test_a_weighting_of_vectors_is_refused_for_other_losses_with_the_way_out(
    weighting: Any,
) -> None:
    source = GramianSource.of(J @ J.T, LOSSES)

    with pytest.raises(ParameterError, match=r"losses of shape \[2, 1\].*Flattening\(weighting\)"):
        weigh(weighting, source, (2, 1))
    assert weigh(Flattening(weighting), source, (2, 1)).shape == (2, 1)
