"""Forward-mode AD: the derivative is right, or the method says that there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from jdcore import ParameterError, get_aggregator, get_weighting

DERIVED: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("sum", {}),
    ("constant", {"weights": torch.tensor([1.0, 2.0, 0.5, 0.0])}),
    ("trimmed_mean", {"trim_number": 1}),
    ("coordinate_wise_median", {}),
]
LOOKING = ["upgrad", "nash_mtl", "mgda", "pcgrad", "cagrad", "geometric_median", "krum", "moco"]
ARGUMENTS: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.5}, "krum": {"n_byzantine": 1}}


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, dtype=torch.float64, generator=generator).to(dtype)


def blocks(matrix: Tensor) -> list[Tensor]:
    return [matrix[:, :2], matrix[:, 2:]]


@pytest.mark.parametrize(("name", "arguments"), DERIVED, ids=[name for name, _ in DERIVED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sums_of_rows_keep_the_tangent(
    name: str, arguments: dict[str, Any], dtype: torch.dtype, requires_grad: bool
) -> None:
    aggregator = get_aggregator(name, **arguments)
    primal, tangent = draw(0), draw(1)
    step = 1e-6
    expected = (aggregator(primal + step * tangent) - aggregator(primal - step * tangent)) / (
        2.0 * step
    )

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(
            primal.to(dtype).requires_grad_(requires_grad), tangent.to(dtype)
        )
        whole = forward_ad.unpack_dual(aggregator(dual)).tangent
        parts = [
            forward_ad.unpack_dual(vector).tangent
            for vector in aggregator.aggregate_blocks(blocks(dual))[0]
        ]

    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_methods_that_look_at_numbers_refuse_the_tangent(
    name: str, dtype: torch.dtype, requires_grad: bool
) -> None:
    aggregator = get_aggregator(name, **ARGUMENTS.get(name, {}))
    primal = draw(0, dtype).requires_grad_(requires_grad)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, draw(1, dtype))
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            aggregator(dual)
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            aggregator.aggregate_blocks(blocks(dual))
        assert aggregator(forward_ad.unpack_dual(dual).primal).isfinite().all()


@pytest.mark.parametrize("name", ["upgrad", "modo", "nash_mtl"])
def test_a_gramian_with_a_tangent_is_refused_and_leaves_the_state(name: str) -> None:
    weighting = get_weighting(name)
    before = str(weighting.state_dict()) if hasattr(weighting, "state_dict") else ""
    primal = draw(0)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, draw(1))
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            weighting(dual @ dual.T)

    after = str(weighting.state_dict()) if hasattr(weighting, "state_dict") else ""
    assert after == before


@pytest.mark.parametrize("wrapper", ["row_normalized", "present_tasks", "bucketing", "per_group"])
def test_wrappers_do_not_lose_the_tangent_on_the_way(wrapper: str) -> None:
    arguments = {"columns": [3]} if wrapper == "per_group" else {}
    aggregator = get_aggregator(wrapper, aggregator=get_aggregator("mgda"), **arguments)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(draw(0), draw(1))
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            aggregator(dual)
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            aggregator.aggregate_blocks(blocks(dual))


def test_a_tangent_of_the_second_batch_is_refused() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(draw(0), draw(1))
        with pytest.raises(ParameterError, match="tangent of forward-mode AD"):
            get_aggregator("modo")(draw(2), second=dual)
