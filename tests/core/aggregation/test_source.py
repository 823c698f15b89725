"""What stands for a weighting, and what a weighting may ask of the Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    GramianSource,
    GramianWeighting,
    as_module,
    as_weighting,
)
from jdcore.aggregation._weigh import weigh
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.linalg import proximal_level


@define(eq=False)
class InverseNorms(GramianWeighting):
    """Weights that depend on the Gramian."""

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / np.sqrt(np.diagonal(gramian))


@define(eq=False)
class Diagonal(GramianWeighting):
    """Weights that tell what was added to the Gramian."""

    proximal = True

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.diagonal(gramian) - 1.0


class ByCoordinates:
    """An aggregator that needs the Jacobian itself."""

    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix.amax(0)

    def aggregate_blocks(self, blocks: list[Tensor]) -> Any:
        return [block.amax(0) for block in blocks], None


def test_the_aggregator_of_a_weighting_stands_for_the_weighting() -> None:
    weighting = InverseNorms()
    aggregator = GramianAggregator(weighting)

    assert as_weighting(weighting) is weighting
    assert as_weighting(aggregator) is weighting
    assert GramianAggregator(aggregator).weighting is weighting
    assert Flattening(aggregator).weighting is weighting
    wrapped = as_module(weighting)
    assert as_weighting(wrapped) is wrapped


@pytest.mark.parametrize("given", [ByCoordinates(), 3.0, InverseNorms, None])
def test_what_is_no_weighting_is_refused_by_all_that_take_one(given: Any) -> None:
    for call in (as_weighting, GramianAggregator, Flattening):
        with pytest.raises(ParameterTypeError, match="weighting"):
            call(given)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("mean", r"Look it up: jdcore\.get_weighting\('mean'\)"),
        (InverseNorms, r"Make one: InverseNorms\(\)"),
        (ByCoordinates(), "Methods that need the Jacobian itself: backward"),
    ],
)
def test_the_refusal_says_how_a_weighting_is_made(given: Any, hint: str) -> None:
    with pytest.raises(ParameterTypeError, match=hint):
        as_weighting(given)


def test_flattening_an_aggregator_gives_its_weights() -> None:
    rows = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    gramian = (rows @ rows.T).reshape(2, 3, 2, 3).permute(0, 1, 3, 2)

    weights = Flattening(GramianAggregator(InverseNorms()))(gramian)

    expected = InverseNorms()(rows @ rows.T).reshape(2, 3)
    torch.testing.assert_close(weights, expected)


def test_the_gramian_is_computed_once_and_only_if_asked_for() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return 4.0 * torch.eye(2, dtype=torch.float64)

    source = GramianSource(2, torch.float32, torch.device("cpu"), compute)
    assert not source.asked

    weights = weigh(InverseNorms(), source)
    source.gramian()

    assert weights.tolist() == [0.5, 0.5]
    assert source.asked
    assert len(calls) == 1


def test_weights_of_another_shape_are_refused() -> None:
    source = GramianSource.of(torch.eye(3))

    with pytest.raises(ParameterError, match=r"shape \[3\]"):
        weigh(lambda G: torch.ones(2), source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_proximal_weighting_gets_the_level_of_the_rows(dtype: torch.dtype) -> None:
    rows = torch.eye(4, dtype=dtype)

    _, weights = GramianAggregator(Diagonal()).aggregate_blocks([rows])

    torch.testing.assert_close(
        weights.double(),
        torch.full((4,), proximal_level(4, dtype), dtype=torch.float64),
        rtol=0.2,
        atol=0.0,
    )
    assert Diagonal().compute(np.eye(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_whose_diagonal_holds_no_squares_is_no_gramian(dtype: torch.dtype) -> None:
    matrix = torch.tensor([[1.0, 0.2], [0.2, -0.5]], dtype=dtype)
    source = GramianSource.of(matrix)  # a method that does not ask need not mind
    with pytest.raises(ParameterError, match=r"`gramian`.*squared lengths.*with -0\.5 there"):
        source.gramian()
    assert GramianSource.of(matrix.abs()).gramian().min() > 0.0
    assert GramianSource.of(matrix[:0, :0]).gramian().shape == (0, 0)


@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.vmap])
@pytest.mark.parametrize("shape", [(3, 4), (3, 3000)])
def test_numbers_inside_of_a_transform_are_not_looked_at(
    transform: Any, shape: tuple[int, ...]
) -> None:
    aggregator, matrix = GramianAggregator(InverseNorms()), torch.randn(shape)
    results = []

    def of_outside(ones: Tensor) -> Tensor:
        results.append(aggregator(matrix))
        return ones

    with pytest.raises(ParameterError, match=r"`matrix`.*inside of a transform of torch\.func"):
        transform(aggregator)(torch.ones(1, *shape) if transform is torch.vmap else matrix)
    transform(of_outside)(torch.ones(2))

    assert torch.equal(results[0], aggregator(matrix))
