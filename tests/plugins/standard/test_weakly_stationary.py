"""
Near weak Pareto stationarity, where training ends: some rows cancel, the others agree.

The dual cone is then a thin sliver of directions, which rounding the rows moves.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward

SIZES = [(20, 10, 12), (20, 100, 12), (8, 4, 5), (64, 30, 40)]
METHODS = ("upgrad", "dualproj", "mgda", "cagrad", "nash_mtl", "aligned_mtl", "config", "imtl_g")
NON_CONFLICTING = ("upgrad", "dualproj", "mgda", "nash_mtl")


def weakly_stationary(m: int, n: int, cancelling: int, seed: int) -> Tensor:
    """
    Float64 rows, in random order: a positive combination of some is zero, and all of these are
    orthogonal to one direction, along which the others agree.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    direction = torch.nn.functional.normalize(draw(n), dim=0)
    rows = draw(m, n)
    rows -= torch.outer(rows @ direction, direction)
    mixture = draw(cancelling - 1, 1).abs() + 0.1
    rows[cancelling - 1] = -(mixture * rows[: cancelling - 1]).sum(0)
    rows[cancelling:] += draw(m - cancelling, 1).abs() * direction
    return rows[torch.randperm(m, generator=generator)]


def update(name: str, rows: Tensor) -> Tensor:
    arguments = {"c": 0.5} if name == "cagrad" else {}
    vector: Tensor = jdcore.get_aggregator(name, **arguments)(rows)
    assert vector.dtype == rows.dtype
    return vector.double()


def length(vector: Tensor) -> float:
    return float(vector.norm())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("m", "n", "cancelling"), SIZES)
def test_the_update_does_not_depend_on_the_order_or_the_dtype_of_the_rows(
    name: str, m: int, n: int, cancelling: int
) -> None:
    for seed in range(3):
        rows = weakly_stationary(m, n, cancelling, seed)
        scale = max(length(rows.mean(0)), length(update(name, rows)))
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
            rounded = rows.to(dtype)
            vector = update(name, rounded)
            assert length(vector - update(name, rounded[order])) <= tolerance * scale
        assert length(vector - update(name, rows)) <= 1e-3 * scale
        assert length(vector - update(name, rows.float().double())) <= 1e-4 * scale


@pytest.mark.parametrize("name", NON_CONFLICTING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "cancelling"), SIZES)
def test_the_update_conflicts_with_no_row_beyond_rounding(
    name: str, dtype: torch.dtype, m: int, n: int, cancelling: int
) -> None:
    for seed in range(3):
        rows = weakly_stationary(m, n, cancelling, seed).to(dtype)
        wide, vector = rows.double(), update(name, rows)
        conflict = -float((wide @ vector / wide.norm(dim=1)).min())
        # The update itself is rounded to the dtype of the rows.
        rounding = float(torch.finfo(dtype).eps) * length(vector)
        assert conflict <= 1e-3 * length(wide.mean(0)) + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "cancelling"), SIZES)
def test_a_projection_is_not_longer_than_what_is_projected(
    dtype: torch.dtype, m: int, n: int, cancelling: int
) -> None:
    for seed in range(3):
        rows = weakly_stationary(m, n, cancelling, seed).to(dtype)
        wide = rows.double()
        slack = 1.0 + float(torch.finfo(dtype).eps)
        assert length(update("dualproj", rows)) <= slack * length(wide.mean(0))
        # UPGrad projects every row.
        assert length(update("upgrad", rows)) <= slack * float(wide.norm(dim=1).mean())
        # The shortest combination of the rows is no longer than any other.
        assert length(update("mgda", rows)) <= slack * length(wide.mean(0))


def test_weights_stay_small_where_rows_cancel_up_to_rounding() -> None:
    for seed in range(5):
        rows = weakly_stationary(20, 100, 12, seed).float()
        _, weights = jdcore.get_aggregator("upgrad").aggregate_blocks([rows])
        assert float(weights.abs().max()) <= 1e3


def engine_update(name: str, rows: Tensor, how: str) -> Tensor:
    """The update for losses that are linear in one weight, whose gradients are the rows."""
    arguments = {"c": 0.5} if name == "cagrad" else {}
    weighting = jdcore.get_weighting(name, **arguments)
    layer = torch.nn.Linear(rows.shape[1], 1, bias=False, dtype=rows.dtype)
    losses = layer(rows).squeeze(1)
    if how == "gramian_backward":
        gramian_backward(losses, weighting)
    else:
        batch_dim = 0 if how == "samples" else None
        Engine(layer, batch_dim=batch_dim).backward(losses, weighting)
    assert layer.weight.grad is not None
    return layer.weight.grad.flatten().double()


@pytest.mark.parametrize("how", ["samples", "tasks", "gramian_backward"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("m", "n", "cancelling"), SIZES)
def test_the_engine_in_float32_makes_the_update_of_the_same_rows_in_float64(
    name: str, m: int, n: int, cancelling: int, how: str
) -> None:
    rows = weakly_stationary(m, n, cancelling, seed=1).float()
    expected = update(name, rows.double())  # which knows that they were rounded to float32
    found = engine_update(name, rows, how)
    scale = max(length(rows.double().mean(0)), length(expected))
    assert length(found - expected) <= 1e-3 * scale
    if name in NON_CONFLICTING:
        lengths = rows.double().norm(dim=1)
        assert float((rows.double() @ found / lengths).min()) >= -1e-3 * scale
