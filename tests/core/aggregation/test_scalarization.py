from __future__ import annotations

import pytest
import torch
from attrs import define, field
from torch import Tensor

from jdcore import ParameterError, Weighting
from jdcore.aggregation import GramianAggregator, GramianSource, ScalarizationWeighting
from jdcore.autojac import gramian_backward
from jdcore.errors import NonFiniteError
from jdcore.validators import row_vector


@define(eq=False)
class CountdownWeighting(ScalarizationWeighting):
    """Weights m, m - 1, ..., 1, times a factor for each row."""

    factors: Tensor | None = field(default=None, validator=row_vector)

    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        weights = torch.arange(m, 0, -1, dtype=dtype)
        return weights if self.factors is None else weights * self.factors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_depend_on_the_number_of_rows_alone(dtype: torch.dtype) -> None:
    weighting = CountdownWeighting()

    assert isinstance(weighting, Weighting)
    assert torch.equal(weighting(torch.rand(3, 3, dtype=dtype)), torch.tensor([3, 2, 1]).to(dtype))
    assert weighting(torch.empty(0, 0, dtype=dtype)).shape == (0,)


def test_the_aggregator_sums_the_weighted_rows_and_can_be_differentiated() -> None:
    matrix = torch.tensor([[1.0, 2.0], [10.0, 20.0]], requires_grad=True)

    vector = GramianAggregator(CountdownWeighting())(matrix)
    vector.sum().backward()

    assert torch.equal(vector.detach(), torch.tensor([12.0, 24.0]))
    assert torch.equal(matrix.grad, torch.tensor([[2.0, 2.0], [1.0, 1.0]]))


@define(eq=False)
class OtherWeights(CountdownWeighting):
    def weigh(self, source: GramianSource, /) -> Tensor:
        return super().weigh(source) * 10.0


@define(eq=False)
class OtherCall(CountdownWeighting):
    def __call__(self, gramian: Tensor, /, *, losses: Tensor | None = None) -> Tensor:
        return gramian.diagonal()


def test_an_aggregator_asks_a_subclass_as_that_means_to_be_asked() -> None:
    matrix = torch.eye(2)

    assert GramianAggregator(OtherWeights())(matrix).tolist() == [20.0, 10.0]
    assert GramianAggregator(OtherCall())(2.0 * matrix).tolist() == [8.0, 8.0]


@define(eq=False)
class TooMany(CountdownWeighting):
    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(m + 1, dtype=dtype)


def test_an_aggregator_refuses_weights_of_another_shape() -> None:
    with pytest.raises(ParameterError, match=r"shape \[2\]"):
        GramianAggregator(TooMany())(torch.eye(2))


def test_blocks_are_summed_one_by_one_with_the_weights_in_the_promoted_dtype() -> None:
    blocks = [torch.ones(2, 3), torch.ones(2, 1, dtype=torch.float64)]

    vectors, weights = GramianAggregator(CountdownWeighting()).aggregate_blocks(blocks)

    assert [vector.tolist() for vector in vectors] == [[3.0, 3.0, 3.0], [3.0]]
    assert [vector.dtype for vector in vectors] == [torch.float32, torch.float64]
    assert torch.equal(weights, torch.tensor([2.0, 1.0], dtype=torch.float64))


def test_the_lean_step_computes_no_gramian_for_it() -> None:
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)

    weights = gramian_backward([leaf[0], 3 * leaf[1]], CountdownWeighting())

    assert torch.equal(weights, torch.tensor([2.0, 1.0]))
    assert torch.equal(leaf.grad, torch.tensor([2.0, 3.0]))


def test_nonfinite_rows_give_nan_everywhere_or_an_error_that_names_them() -> None:
    matrix = torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])

    [vector], weights = GramianAggregator(CountdownWeighting()).aggregate_blocks([matrix])
    assert vector.isnan().all()
    assert weights.isnan().all()

    strict = GramianAggregator(CountdownWeighting(check_finite=True))
    with pytest.raises(NonFiniteError, match="1"):
        strict(matrix)


def test_a_finite_matrix_whose_sum_overflows_is_not_blamed() -> None:
    matrix = torch.full((2, 1), 3e38)

    strict = GramianAggregator(CountdownWeighting(check_finite=True))

    assert strict(matrix).item() == float("inf")


def test_an_argument_that_does_not_fit_the_rows_is_refused() -> None:
    aggregator = GramianAggregator(CountdownWeighting(factors=torch.ones(3)))

    with pytest.raises(ParameterError, match="`factors` must be of length 2"):
        aggregator(torch.ones(2, 4))
