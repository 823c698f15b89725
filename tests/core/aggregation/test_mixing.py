"""Wrappers that combine rows, whatever aggregates the combinations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import (
    CrossGramianWeighting,
    Flattening,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    LossWeighting,
    RowMixing,
    StateFields,
    WeightingWrapper,
    as_module,
    as_weighting,
    row_lengths,
    state_field,
    weigh,
)
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._observation import Observation, observing
from jdcore.errors import (
    NonDifferentiableError,
    NonFiniteError,
    ParameterError,
    ParameterTypeError,
)
from tests.core.methods import Largest

MATRIX = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])


@define(eq=False)
class Pairs(RowMixing):
    """Sums of neighbours: [x_1 + x_2, x_2 + x_3, ...]."""

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        return np.eye(source.rows - 1, source.rows) + np.eye(source.rows - 1, source.rows, 1)


@define(eq=False)
class UnitLength(RowMixing):
    """Rows of length one, unless they are shorter than ``least``."""

    least: float = field(default=0.0)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        return np.diag(1.0 / np.maximum(row_lengths(source), self.least))


@define(eq=False)
class ByLength(GramianWeighting):
    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        lengths: NDArray[np.float64] = np.sqrt(np.diagonal(gramian))
        return lengths / lengths.sum()


@define(eq=False)
class ByLoss(LossWeighting):
    def compute_with(
        self, gramian: NDArray[np.float64], losses: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return losses


@define(eq=False)
class InverseLength(GramianWeighting):
    scale_degree = -1

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        lengths: NDArray[np.float64] = np.sqrt(np.diagonal(gramian))
        return 1.0 / lengths


@define(eq=False)
class Counting(StateFields):
    calls: int = state_field(int)

    def __call__(self, matrix: Tensor) -> Tensor:
        self.calls += 1
        return matrix.sum(0)


def test_a_method_of_the_gramian_keeps_its_weighting_and_never_sees_the_combinations() -> None:
    # The sums are (3, 6) and (1, 2): lengths in the ratio 3 : 1.
    wrapper = Pairs(GramianAggregator(ByLength()))

    assert wrapper.weighting is not None
    weights = as_weighting(wrapper)(MATRIX @ MATRIX.T)
    torch.testing.assert_close(weights, torch.tensor([0.75, 1.0, 0.25]))
    torch.testing.assert_close(wrapper(MATRIX), torch.tensor([2.5, 5.0]))


def test_a_method_of_the_matrix_aggregates_the_combinations() -> None:
    wrapper = Pairs(Largest())

    assert wrapper.weighting is None
    assert wrapper(MATRIX).tolist() == [3.0, 6.0]
    vectors, weights = wrapper.aggregate_blocks([MATRIX[:, :1], MATRIX[:, 1:].half()])
    assert [v.tolist() for v in vectors] == [[3.0], [6.0]]
    assert vectors[1].dtype == torch.float16
    assert weights is None


def test_a_plain_function_is_an_aggregator_too() -> None:
    vector = Pairs(lambda matrix: matrix.prod(0))(MATRIX.half())

    assert vector.tolist() == [3.0, 12.0]
    assert vector.dtype == torch.float16


def test_what_needs_all_columns_at_once_is_refused_where_they_lie_elsewhere() -> None:
    class Elsewhere(Columns):
        pass

    plain, nested = Pairs(lambda matrix: matrix.sum(0)), Pairs(Pairs(lambda matrix: matrix.sum(0)))
    for wrapper in (plain, nested):
        with pytest.raises(ParameterError, match="`aggregator` must be one that can aggregate"):
            wrapper.aggregate_columns(Elsewhere([MATRIX]))
    vectors, _ = Pairs(Largest()).aggregate_columns(Elsewhere([MATRIX]))
    assert vectors[0].tolist() == [3.0, 6.0]


def test_wrappers_nest() -> None:
    both = Pairs(Pairs(GramianAggregator(ByLength())))

    torch.testing.assert_close(both(MATRIX), torch.tensor([4.0, 8.0]))
    assert Pairs(Pairs(Largest()))(MATRIX).tolist() == [4.0, 8.0]


@pytest.mark.parametrize(
    "inner",
    [Largest(), GramianAggregator(ByLength()), GramianAggregator(InverseLength())],
    ids=repr,
)
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_lengths_are_those_of_the_rows_at_any_scale(inner: Any, scale: float) -> None:
    matrix = MATRIX.double() * scale
    directions = MATRIX.double() / MATRIX.double().norm(dim=1, keepdim=True)

    torch.testing.assert_close(UnitLength(inner)(matrix), inner(directions))


@pytest.mark.parametrize("inner", [Largest(), GramianAggregator(ByLength())], ids=repr)
@pytest.mark.parametrize("wrapper", [Pairs, UnitLength])
def test_non_finite_rows_give_nan_or_an_error_that_names_them(inner: Any, wrapper: Any) -> None:
    matrix = MATRIX.clone()
    matrix[2, 0] = math.inf

    assert wrapper(inner)(matrix).isnan().all()
    with pytest.raises(NonFiniteError) as caught:
        wrapper(inner, check_finite=True)(matrix)
    assert caught.value.rows == (2,)


def test_no_rows_give_zeros_and_no_weights() -> None:
    empty = torch.zeros(0, 2)

    assert Pairs(Largest())(empty).tolist() == [0.0, 0.0]
    assert Pairs(GramianAggregator(ByLength()))(empty).tolist() == [0.0, 0.0]
    assert as_weighting(Pairs(GramianAggregator(ByLength())))(torch.zeros(0, 0)).shape == (0,)


def test_the_weighting_serves_generalized_gramians() -> None:
    flattening = Flattening(Pairs(GramianAggregator(ByLength())))  # type: ignore[arg-type]

    assert flattening(torch.ones(2, 2, 2, 2)).shape == (2, 2)


def test_the_wrapped_method_looks_at_the_losses_of_the_combinations() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0])  # their sums of neighbours are 3 and 6
    wrapper = Pairs(GramianAggregator(ByLoss()))

    assert wrapper(MATRIX, losses=losses).tolist() == [15.0, 30.0]
    assert as_weighting(wrapper)(MATRIX @ MATRIX.T, losses=losses).tolist() == [3.0, 9.0, 6.0]
    with pytest.raises(ParameterError, match="`losses` must be given"):
        wrapper(MATRIX)


def test_a_wrapped_method_of_the_matrix_is_given_losses_too() -> None:
    def weighted(matrix: Tensor, losses: Tensor) -> Tensor:
        return losses.to(matrix) @ matrix

    assert Pairs(weighted)(MATRIX, losses=torch.tensor([1.0, 2.0, 4.0])).tolist() == [15.0, 30.0]


def test_the_state_is_that_of_what_is_wrapped() -> None:
    one, two = Pairs(Counting()), Pairs(Counting())
    one(MATRIX)
    one(MATRIX)

    expected = {"aggregator": {"calls": 2}}
    assert one.state_dict() == expected
    two.load_state_dict(one.state_dict())
    assert two.state_dict() == expected
    assert as_module(one).state_dict() == {"_extra_state": expected}
    one.reset()
    assert one.state_dict() == {"aggregator": {"calls": 0}}


def test_the_state_of_a_weighting_inside_of_an_adapter_is_found() -> None:
    @define(eq=False)
    class Counting(StateFields, GramianWeighting):
        calls: int = state_field(int)

        def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
            self.calls += 1
            return np.ones(len(gramian))

    one, two = (Pairs(as_module(GramianAggregator(Counting()))) for _ in range(2))
    one(torch.eye(2))
    two.load_state_dict(one.state_dict())

    assert two.state_dict() == {"aggregator": {"calls": 1}}
    two.reset()
    assert two.state_dict() == {"aggregator": {"calls": 0}}


def test_without_state_there_is_nothing_to_save_and_a_foreign_state_is_refused() -> None:
    wrapper = Pairs(Largest())
    wrapper.reset()

    assert wrapper.state_dict() == {}
    wrapper.load_state_dict({})
    with pytest.raises(ParameterError, match=r"with the keys \[\], got the keys \['calls'\]"):
        wrapper.load_state_dict({"calls": 1})


def test_differentiating_is_refused() -> None:
    for inner in (Largest(), GramianAggregator(ByLength())):
        with pytest.raises(NonDifferentiableError, match="Pairs"):
            Pairs(inner)(MATRIX.clone().requires_grad_()).sum().backward()


def test_only_the_wrapper_is_observed() -> None:
    heard: list[Observation] = []

    with observing(heard.append):
        Pairs(Largest())(MATRIX)
        Pairs(GramianAggregator(ByLength()))(MATRIX)

    assert len(heard) == 2
    assert [t.tolist() for t in heard[0].update(1.0)] == [[33.0, 12.0, 3.0], 45.0]  # of (3, 6)
    assert heard[1].weights is not None


@pytest.mark.parametrize("wrong", [None, "krum", Largest, torch.ones(2)])
def test_what_is_no_aggregator_is_refused(wrong: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`aggregator` must be an Aggregator"):
        Pairs(wrong)


def test_a_weighting_is_refused_with_the_way_to_its_aggregator() -> None:
    with pytest.raises(ParameterTypeError, match=r"GramianAggregator\(ByLength\(\)\)"):
        Pairs(ByLength())


def test_a_wrapped_function_that_returns_no_update_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"returns a real Tensor of shape \[2\]"):
        Pairs(lambda jacobian: jacobian[0, :1])(MATRIX)


@define(eq=False)
class ByCross(CrossGramianWeighting):
    """The first column of the cross-Gramian, which tells both batches and the order of the rows."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        column: NDArray[np.float64] = gramian[:, 0] / np.abs(gramian).max()
        return column


class RowsTimesSecond:
    """Needs both Jacobians, and knows no blocks."""

    def __call__(self, matrix: Tensor, /, *, second: Tensor) -> Tensor:
        return (matrix * second).sum(dim=0)


SECOND = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [0.0, 3.0]])


@pytest.mark.parametrize("scale", [1.0, 2.0**-600, 2.0**600])
def test_the_second_batch_is_combined_as_the_first(scale: float) -> None:
    first, second = MATRIX.double() * scale, SECOND.double() * scale
    mixing = torch.diag(1.0 / MATRIX.double().norm(dim=1)) / scale
    mixed = mixing @ first
    cross = mixed @ (mixing @ second).T
    weights = cross[:, 0] / cross.abs().max()
    aggregator = UnitLength(GramianAggregator(ByCross()))

    torch.testing.assert_close(aggregator(first, second=second), weights @ mixed)
    vectors, _ = aggregator.aggregate_blocks(
        [first[:, :1], first[:, 1:]], second=[second[:, :1], second[:, 1:]]
    )
    torch.testing.assert_close(torch.cat(vectors), weights @ mixed)


def test_a_weighting_of_combined_rows_takes_the_cross_gramian() -> None:
    cross = MATRIX @ SECOND.T
    mixing = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    mixed = mixing @ cross @ mixing.T
    expected = mixed[:, 0] / mixed.abs().max() @ mixing

    weighting = as_weighting(Pairs(GramianAggregator(ByCross())))

    torch.testing.assert_close(weighting(cross), expected)
    with pytest.raises(ParameterError, match="the cross-Gramian of two batches"):
        as_weighting(UnitLength(GramianAggregator(ByCross())))(cross)


def test_a_function_of_both_jacobians_is_given_the_combinations_of_both() -> None:
    pair = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    twice = torch.tensor([[1.0, 1.0]]) @ pair

    once = Pairs(RowsTimesSecond())(MATRIX, second=SECOND)
    nested = Pairs(Pairs(RowsTimesSecond()))(MATRIX, second=SECOND)

    torch.testing.assert_close(once, ((pair @ MATRIX) * (pair @ SECOND)).sum(dim=0))
    torch.testing.assert_close(nested, ((twice @ MATRIX) * (twice @ SECOND)).sum(dim=0))


def test_a_second_batch_that_does_not_fit_or_is_missing_is_told() -> None:
    aggregator = Pairs(GramianAggregator(ByCross()))

    with pytest.raises(ParameterError, match=r"`second`.*\[3, 2\], as the first"):
        aggregator(MATRIX, second=SECOND[:2])
    with pytest.raises(ParameterError, match="the cross-Gramian of two independent batches"):
        aggregator(MATRIX)
    broken = SECOND.clone()
    broken[1, 0] = math.nan
    assert aggregator(MATRIX, second=broken).isnan().all()


@define(eq=False)
class CountedPairs(Pairs):
    steps: int = state_field(int)

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        self.steps += 1
        return super().mix(source)


@define(eq=False)
class CountedWeighting(WeightingWrapper):
    calls: int = state_field(int)

    def rewrite(self, source: GramianSource) -> Tensor:
        self.calls += 1
        return torch.ones(source.rows, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize(
    "inner",
    [GramianAggregator(CountedWeighting(ByLength())), GramianAggregator(ByLength()), Largest()],
)
def test_rows_that_are_not_finite_leave_the_state_as_it_was(inner: Any) -> None:
    wrapper, broken = CountedPairs(inner), MATRIX.clone()
    broken[2, 1] = math.nan
    wrapper(MATRIX)
    before = wrapper.state_dict()

    assert wrapper(broken).isnan().all()
    assert wrapper.state_dict() == before
    assert before["steps"] == 1
    weighting = wrapper.weighting
    if weighting is not None:
        assert weighting(broken @ broken.T).isnan().all()
        assert wrapper.state_dict() == before
    wrapper.check_finite = True
    with pytest.raises(NonFiniteError):
        wrapper(broken)
    assert wrapper.state_dict() == before


@pytest.mark.parametrize("adapt", [GramianAggregator, lambda function: function])
def test_what_is_wrapped_may_fail_and_the_state_is_left_as_it_was(adapt: Any) -> None:
    def fail(matrix: Tensor) -> Tensor:
        raise RuntimeError("not today")

    wrapper = CountedPairs(adapt(fail))
    with pytest.raises(RuntimeError, match="not today"):
        wrapper(MATRIX)
    assert wrapper.state_dict() == {"steps": 0}


def test_an_observer_may_fail_and_the_state_is_left_as_it_was() -> None:
    def fail(observation: Observation) -> None:
        raise RuntimeError("not today")

    wrapper = CountedPairs(GramianAggregator(ByLength()))
    with observing(fail), pytest.raises(RuntimeError, match="not today"):
        wrapper(MATRIX)
    assert wrapper.state_dict() == {"steps": 0}


@define(eq=False)
class Same(WeightingWrapper):
    def rewrite(self, source: GramianSource) -> Tensor:
        return weigh(self.weighting, source)


@pytest.mark.parametrize(
    "make",
    [
        lambda check: Pairs(RowsTimesSecond(), check_finite=check),
        lambda check: Pairs(GramianAggregator(ByCross()), check_finite=check),
        lambda check: GramianAggregator(Same(ByCross(), check_finite=check)),
    ],
)
def test_the_second_batch_is_told_where_it_is_not_finite(make: Any) -> None:
    second = MATRIX.clone()
    second[2, 1] = math.nan

    assert make(None)(MATRIX, second=second).isnan().any()
    with pytest.raises(NonFiniteError) as caught:
        make(True)(MATRIX, second=second)
    assert 2 in caught.value.rows
