"""What is asked for under autocast is computed in the dtypes that were given."""

from __future__ import annotations

import pytest
import torch

from jdcore.aggregation import GramianAggregator, RowMixing
from jdcore.scalarization import TrainableScalarizer, WeightedSum
from tests.core.aggregation.test_mixing import Pairs
from tests.core.methods import EqualWeighting, HalvesWeighting, Largest


@pytest.mark.parametrize(
    "aggregator",
    [GramianAggregator(HalvesWeighting()), GramianAggregator(EqualWeighting()), Pairs(Largest())],
    ids=["gramian", "scalarization", "mixing"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_combined_in_their_own_precision(
    aggregator: GramianAggregator | RowMixing, dtype: torch.dtype
) -> None:
    matrix = torch.randn(12, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = aggregator(matrix)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aggregator(matrix), expected)
        assert torch.equal(aggregator.aggregate_blocks([matrix])[0][0], expected)


def test_losses_are_put_together_in_their_own_precision() -> None:
    class Thirds(WeightedSum):
        def weights(self, m: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((m,), 1 / 3, dtype=dtype)

    class Products(TrainableScalarizer):
        def scalarize(self, losses: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return logits.exp() @ losses

    losses = torch.tensor([1.001, 2.003, 4.007], requires_grad=True)
    for scalarizer in (Thirds(), Products(3)):
        expected = scalarizer(losses)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = scalarizer(losses)
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad(loss, [losses])[0] for loss in (result, expected)]
        assert torch.equal(*gradients)
