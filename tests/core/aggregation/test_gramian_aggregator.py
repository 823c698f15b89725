from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore import Aggregator, BlockwiseAggregator, ParameterError, ParameterTypeError, Weighting
from jdcore.aggregation import (
    Flattening,
    GramianAggregator,
    GramianWeighting,
    ScalarizationWeighting,
    equal_weights,
)
from jdcore.errors import NonDifferentiableError, NonFiniteError
from jdcore.validators import row_vector


@define(eq=False)
class InverseNormWeighting(GramianWeighting):
    """Weights 1/|g_i|: each row counts with unit length."""

    scale_degree = -1
    factors: Tensor | None = field(default=None, validator=row_vector)

    def compute(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / np.sqrt(np.diagonal(gramian))


class EqualWeights(ScalarizationWeighting):
    def compute(self, m: int, dtype: torch.dtype) -> Tensor:
        return equal_weights(1.0 / m, m, dtype)


def test_the_protocols_recognise_what_satisfies_them() -> None:
    aggregator = GramianAggregator(InverseNormWeighting())

    assert isinstance(InverseNormWeighting(), Weighting)
    assert isinstance(aggregator, Aggregator)
    assert isinstance(aggregator, BlockwiseAggregator)
    assert not isinstance(lambda matrix: matrix[0], BlockwiseAggregator)


def test_a_plain_function_can_be_the_weighting() -> None:
    aggregator = GramianAggregator(lambda gramian: gramian.diagonal())

    vector = aggregator(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))

    assert torch.equal(vector, torch.tensor([75.0, 108.0]))


def test_a_weighting_that_cannot_be_called_is_refused_and_the_old_one_kept() -> None:
    aggregator = GramianAggregator(InverseNormWeighting())
    old = aggregator.weighting

    with pytest.raises(
        ParameterTypeError, match="`weighting` must be a Weighting or the aggregator of one, got 3"
    ):
        aggregator.weighting = 3
    assert aggregator.weighting is old


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200])
def test_float32_blocks_beside_float64_ones_out_of_range_count_for_what_they_are(
    scale: float,
) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    alone, _ = GramianAggregator(InverseNormWeighting()).aggregate_blocks([rows * scale])

    blocks = [rows * scale, torch.zeros(2, 3)]
    vectors, _ = GramianAggregator(InverseNormWeighting()).aggregate_blocks(blocks)

    assert torch.equal(vectors[0], alone[0])
    assert torch.equal(vectors[1], torch.zeros(3))


@pytest.mark.parametrize("scale", [1e-250, 1e-200, 1e-20, 1.0, 1e160, 1e250])
def test_float64_rows_of_any_scale_are_aggregated_exactly(scale: float) -> None:
    matrix = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64) * scale

    [vector], weights = GramianAggregator(InverseNormWeighting()).aggregate_blocks([matrix])

    expected = torch.tensor([0.6, 1.8], dtype=torch.float64)
    torch.testing.assert_close(vector, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        weights * scale, torch.tensor([0.2, 0.5], dtype=torch.float64), rtol=1e-12, atol=0.0
    )


def test_weights_come_back_in_the_promoted_dtype_of_the_blocks() -> None:
    blocks = [torch.eye(2, dtype=torch.bfloat16), torch.eye(2)]

    vectors, weights = GramianAggregator(InverseNormWeighting()).aggregate_blocks(blocks)

    assert [v.dtype for v in vectors] == [torch.bfloat16, torch.float32]
    assert weights.dtype == torch.float32


def test_malformed_blocks_are_refused() -> None:
    aggregator = GramianAggregator(InverseNormWeighting())

    with pytest.raises(ParameterError, match="`blocks` must be at least one matrix, got none"):
        aggregator.aggregate_blocks([])
    with pytest.raises(ParameterError, match="`blocks` must be matrices with 2 rows, as the first"):
        aggregator.aggregate_blocks([torch.eye(2), torch.eye(3)])


@pytest.mark.parametrize(
    ("variable", "raises"),
    [("1", True), ("true", True), ("0", False), ("", False), ("False", False), ("off", False)],
)
def test_the_environment_decides_about_nonfinite_input_unless_the_argument_does(
    monkeypatch: pytest.MonkeyPatch, variable: str, raises: bool
) -> None:
    monkeypatch.setenv("JDCORE_CHECK_FINITE", variable)
    matrix = torch.tensor([[1.0, 2.0], [float("inf"), 1.0], [float("nan"), 1.0]])

    if raises:
        with pytest.raises(NonFiniteError, match=r"objectives \[1, 2\] hold NaN or infinite"):
            GramianAggregator(InverseNormWeighting())(matrix)
    else:
        assert GramianAggregator(InverseNormWeighting())(matrix).isnan().all()
    assert GramianAggregator(InverseNormWeighting(check_finite=False))(matrix).isnan().all()


def test_differentiating_through_weights_raises_and_names_the_method() -> None:
    gramian = torch.eye(2, requires_grad=True)

    weights = InverseNormWeighting()(gramian)

    with pytest.raises(NonDifferentiableError, match=r"InverseNormWeighting.* is not different"):
        weights.sum().backward()
    with torch.no_grad():
        assert not InverseNormWeighting()(gramian).requires_grad


def test_a_row_vector_of_the_wrong_length_or_device_is_named_with_the_way_out() -> None:
    short = InverseNormWeighting(factors=torch.ones(3))
    elsewhere = InverseNormWeighting(factors=torch.ones(2, device="meta"))

    with pytest.raises(ParameterError, match="`factors` must be of length 2, the number of obj"):
        short(torch.eye(2))
    with pytest.raises(ParameterError, match=r"on cpu.*got a Tensor on meta.*factors.to\('cpu'\)"):
        elsewhere(torch.eye(2))


def test_flattening_weighs_every_element_of_the_losses() -> None:
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 4.0], [8.0, 0.0]]])
    generalized = torch.einsum("abx,dcx->abcd", gradients, gradients)

    weights = Flattening(InverseNormWeighting())(generalized)

    assert torch.equal(weights, torch.tensor([[1.0, 0.5], [0.25, 0.125]]))


def test_the_weights_that_flattening_gives_are_the_callers_own() -> None:
    gramian = torch.eye(4, dtype=torch.float64).reshape(2, 2, 2, 2).permute(0, 1, 3, 2)
    weights = Flattening(EqualWeights())(gramian)
    weights.zero_()

    assert torch.equal(Flattening(EqualWeights())(gramian), torch.full((2, 2), 0.25).double())


def test_flattening_refuses_what_other_weightings_refuse() -> None:
    flattening = Flattening(InverseNormWeighting())
    gramian = torch.eye(2)

    with pytest.raises(NonDifferentiableError):
        flattening(gramian.clone().requires_grad_()).sum().backward()
    with pytest.raises(ParameterTypeError, match="`gramian` must be of a real floating dtype"):
        flattening(gramian.long())
    with pytest.raises(ParameterTypeError, match="`gramian` must be a Tensor, got a list"):
        flattening(gramian.tolist())
    with pytest.raises(ParameterError, match=r"`losses` must be of shape \[1, 2\]"):
        flattening(gramian.reshape(1, 2, 2, 1), losses=torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 130])  # of several strips
@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((1, 0), 0.4, "which is symmetric, got a matrix with triangles that differ"),
        ((0, 1), 3.0, "whose cosines are at most 1, got a matrix with larger ones"),
        ((-1, -1), 0.0, "whose cosines are at most 1"),
    ],
)
def test_a_matrix_that_is_the_gramian_of_no_rows_is_refused(
    dtype: torch.dtype, m: int, place: tuple[int, int], value: float, reason: str
) -> None:
    gramian = torch.full((m, m), 0.5, dtype=dtype).fill_diagonal_(1.0)
    InverseNormWeighting()(gramian)
    gramian[place] = value

    with pytest.raises(ParameterError, match=reason):
        InverseNormWeighting()(gramian)


def test_a_gramian_may_be_as_rough_as_its_products() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        gramian = (rows @ rows.T).to(dtype)
        gramian.triu_().add_(gramian.triu(1).T * (1 + torch.finfo(dtype).eps))

        assert InverseNormWeighting()(gramian).isfinite().all()


@pytest.mark.parametrize(
    "kind",
    [torch.Tensor.to_sparse, lambda matrix: matrix.to("meta")],
    ids=["sparse", "meta"],
)
def test_a_matrix_without_entries_to_look_at_is_refused(kind: Any) -> None:
    with pytest.raises(ParameterError, match="`matrix` must be a dense Tensor with entries"):
        GramianAggregator(EqualWeights())(kind(torch.eye(2)))
    with pytest.raises(ParameterError, match="`gramian` must be a dense Tensor with entries"):
        InverseNormWeighting()(kind(torch.eye(2)))


def test_a_weighting_that_overrides_the_call_is_called() -> None:
    class FirstRow(InverseNormWeighting):
        def __call__(self, gramian: Tensor, /) -> Tensor:
            return torch.eye(len(gramian), dtype=gramian.dtype)[0]

    matrix = torch.tensor([[1.0, 2.0], [10.0, 20.0]])

    assert torch.equal(GramianAggregator(FirstRow())(matrix), matrix[0])


@pytest.mark.parametrize("m", [3, 70])
def test_infinities_of_both_signs_in_the_gramian_are_found_without_a_warning(m: int) -> None:
    gramian = torch.eye(m)
    gramian[0, 1], gramian[1, 0] = float("inf"), -float("inf")

    assert InverseNormWeighting()(gramian).isnan().all()


def test_complex_weights_are_refused_rather_than_made_real() -> None:
    aggregator = GramianAggregator(lambda gramian: torch.ones(len(gramian), dtype=torch.complex64))

    with pytest.raises(ParameterError, match="real weights of shape"):
        aggregator(torch.eye(2))


@pytest.mark.parametrize("size", [1.7e308, 1e-307])
def test_rows_at_the_ends_of_the_range_are_aggregated(size: float) -> None:
    rows = size * torch.eye(2, dtype=torch.float64)

    assert GramianAggregator(InverseNormWeighting())(rows).tolist() == pytest.approx([1.0, 1.0])
