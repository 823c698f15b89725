"""
Updates where rows nearly cancel, as they do where training ends, in every dtype of the rows.

Near weak Pareto stationarity some rows cancel and the others agree: the dual cone is a thin sliver
of directions, which rounding the rows moves. Opposite rows, equal rows, and rows of very different
lengths are hard in other ways.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore.aggregation import Columns, GramianSource, weigh
from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward

SIZES = [(20, 10), (8, 4), (20, 100), (64, 30)]
METHODS = (
    *("upgrad", "dualproj", "mgda", "cagrad", "nash_mtl", "fairgrad"),
    *("aligned_mtl", "config", "imtl_g", "conic_grad"),
)
# The length of their updates is one or more, whatever that of the rows; zero where all cancel.
UNSCALED = ("nash_mtl", "fairgrad")
NON_CONFLICTING = ("upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
C = 0.5


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def weakly_stationary(m: int, n: int, generator: torch.Generator) -> Tensor:
    """
    A positive combination of some rows is zero, and all of these are orthogonal to one direction,
    along which the others agree.
    """
    cancelling = max(2, round(0.6 * m))
    direction = torch.nn.functional.normalize(draw(generator, n), dim=0)
    rows = draw(generator, m, n)
    rows -= torch.outer(rows @ direction, direction)
    mixture = draw(generator, cancelling - 1, 1).abs() + 0.1
    rows[cancelling - 1] = -(mixture * rows[: cancelling - 1]).sum(0)
    rows[cancelling:] += draw(generator, m - cancelling, 1).abs() * direction
    return rows


def rows_of(family: str, m: int, n: int, seed: int) -> Tensor:
    """Float64 rows, in random order."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw(generator, m, n)
    factors = draw(generator, m, 1).abs() + 0.1
    half = m // 2
    twins = slice(half, 2 * half)
    if family.startswith("weak"):
        rows = weakly_stationary(m, n, generator)
    elif family == "stationary":
        rows[-1] = -(factors * rows)[:-1].sum(0)
    elif family == "one opposite pair":
        rows[1] = -0.7 * rows[0]
    elif family == "opposite pairs":
        rows[twins] = -factors[:half] * rows[:half]
    elif family == "nearly opposite pairs":
        rows[twins] = -rows[:half] + 1e-4 * rows[twins]
    elif family == "equal pairs":
        rows[twins] = rows[:half]
    elif family == "multiples":
        rows[twins] = factors[:half] * rows[:half]
    elif family == "nearly equal pairs":
        rows[twins] = rows[:half] + 1e-4 * rows[twins]
    elif family == "low rank":
        rank = min(m, n) // 2
        rows = rows[:, :rank] @ draw(generator, rank, n)
    elif family == "small mean":
        rows -= 0.99 * rows.mean(0)
    if family.endswith("of all lengths"):
        rows *= 10.0 ** (6.0 * torch.rand(m, 1, dtype=torch.float64, generator=generator) - 4.0)
    return rows[torch.randperm(m, generator=generator)]


FAMILIES = (
    *("independent", "of all lengths", "weakly stationary", "weakly stationary, of all lengths"),
    *("stationary", "one opposite pair", "opposite pairs", "nearly opposite pairs"),
    *("equal pairs", "multiples", "nearly equal pairs", "low rank", "small mean"),
)


def update(name: str, rows: Tensor) -> Tensor:
    arguments = {"c": C} if name == "cagrad" else {}
    vector: Tensor = jdcore.get_aggregator(name, **arguments)(rows)
    assert vector.dtype == rows.dtype
    return vector.double()


def length(vector: Tensor) -> float:
    return float(vector.norm())


def mean_length(rows: Tensor) -> float:
    return float(rows.double().norm(dim=1).mean())


def scale_of(name: str, rows: Tensor, vector: Tensor) -> float:
    """What differences of updates are relative to: rows may cancel to all of their digits."""
    if name in UNSCALED:
        return 1.0
    return max(length(rows.double().mean(0)), length(vector), 1e-8 * mean_length(rows))


def check_order_and_dtype(name: str, family: str, m: int, n: int, seed: int) -> None:
    rows = rows_of(family, m, n, seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    # Rows that agree up to 1e-4 leave half of the digits of their Gramian, and rounding them to
    # float32 moves what they differ by.
    near = family.startswith("nearly")
    exact = update(name, rows)
    for dtype in DTYPES:
        rounded = rows.to(dtype)
        vector = update(name, rounded)
        assert vector.isfinite().all()
        eps = torch.finfo(dtype).eps
        tolerance = max((1e-6 if near else 1e-8) if dtype == torch.float64 else 1e-4, eps)
        scale = scale_of(name, rounded, vector)
        assert length(vector - update(name, rounded[order])) <= tolerance * scale
        if dtype == torch.float32:
            assert length(vector - update(name, rounded.double())) <= 1e-3 * scale
            assert near or length(vector - exact) <= 1e-3 * scale


def check_conflicts(name: str, family: str, m: int, n: int, seed: int) -> None:
    for dtype in DTYPES:
        rows = rows_of(family, m, n, seed).to(dtype)
        wide, vector = rows.double(), update(name, rows)
        conflict = -float((wide @ vector / wide.norm(dim=1)).min())
        # The update itself is rounded to the dtype of the rows.
        eps = torch.finfo(dtype).eps
        scale = 1.0 if name in UNSCALED else length(wide.mean(0))
        if name not in UNSCALED and scale <= eps * mean_length(wide):
            continue  # a mean that is rounding is no measure
        assert conflict <= 1e-3 * scale + eps * length(vector)


def check_lengths(family: str, m: int, n: int, seed: int) -> None:
    for dtype in DTYPES:
        rows = rows_of(family, m, n, seed).to(dtype)
        wide, eps = rows.double(), torch.finfo(dtype).eps
        mean, shortest = length(wide.mean(0)), float(wide.norm(dim=1).min())
        bounds = {
            "dualproj": mean,
            "upgrad": mean_length(wide),  # it projects every row
            "mgda": min(mean, shortest),  # which are combinations, too
            "cagrad": (1.0 + C) * mean,
        }
        for name, bound in bounds.items():
            assert length(update(name, rows)) <= (1.0 + 2.0 * eps) * bound + 2.0 * eps * shortest


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("m", "n"), SIZES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_does_not_depend_on_the_order_or_the_dtype_of_the_rows(
    family: str, m: int, n: int, name: str
) -> None:
    check_order_and_dtype(name, family, m, n, seed=m)


@pytest.mark.parametrize("name", NON_CONFLICTING)
@pytest.mark.parametrize(("m", "n"), SIZES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_conflicts_with_no_row_beyond_rounding(
    family: str, m: int, n: int, name: str
) -> None:
    check_conflicts(name, family, m, n, seed=m)


@pytest.mark.parametrize("name", NON_CONFLICTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_half_precision_get_weights_that_conflict_by_less_than_rounding_the_update(
    family: str, name: str
) -> None:
    for dtype in DTYPES[2:]:
        for seed in range(3):
            rows = rows_of(family, *SIZES[2], seed).to(dtype)
            wide = rows.double()
            source = GramianSource.of_columns(Columns([rows]))
            vector = weigh(jdcore.get_weighting(name), source) @ wide
            scale = 1.0 if name in UNSCALED else length(wide.mean(0))
            if scale > torch.finfo(dtype).eps * mean_length(wide):
                assert float((wide @ vector / wide.norm(dim=1)).min()) >= -1e-3 * scale


@pytest.mark.parametrize(("m", "n"), SIZES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_is_not_longer_than_what_is_projected(family: str, m: int, n: int) -> None:
    check_lengths(family, m, n, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [*SIZES, (2, 5), (3, 4), (4, 10), (5, 3), (32, 200)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_for_many_matrices(family: str, m: int, n: int) -> None:
    for seed in range(100, 106):
        check_lengths(family, m, n, seed)
        for name in METHODS:
            check_order_and_dtype(name, family, m, n, seed)
        for name in NON_CONFLICTING:
            check_conflicts(name, family, m, n, seed)


def test_rows_in_half_precision_bargain_by_what_their_precision_tells() -> None:
    # With a proximal term below that precision, weights would be a million, and the length of the
    # update rounding.
    check_order_and_dtype("nash_mtl", "one opposite pair", 64, 30, seed=100)


def test_weights_stay_small_where_rows_cancel_up_to_rounding() -> None:
    for seed in range(5):
        rows = rows_of("weakly stationary", 20, 100, seed).float()
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
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_the_engine_in_float32_makes_the_update_of_the_same_rows_in_float64(
    name: str, m: int, n: int, how: str
) -> None:
    rows = rows_of("weakly stationary", m, n, seed=1).float()
    expected = update(name, rows.double())  # which knows that they were rounded to float32
    found = engine_update(name, rows, how)
    scale = max(length(rows.double().mean(0)), length(expected))
    assert length(found - expected) <= 1e-3 * scale
    if name in NON_CONFLICTING:
        lengths = rows.double().norm(dim=1)
        assert float((rows.double() @ found / lengths).min()) >= -1e-3 * scale


@pytest.mark.parametrize("how", ["samples", "gramian_backward"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("m", "n"), [(100, 30), (80, 120)])
def test_more_losses_than_are_multiplied_in_float64_conflict_by_what_their_products_hide(
    name: str, m: int, n: int, how: str
) -> None:
    for family in ("weakly stationary", "opposite pairs"):
        rows = rows_of(family, m, n, seed=2).float()
        check_products(name, rows.double(), engine_update(name, rows, how))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("m", "n"), [(5, 3), (20, 10), (128, 200)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_gramian_gives_weights_of_rows_that_it_may_stem_from(
    family: str, m: int, n: int, name: str
) -> None:
    rows = rows_of(family, m, n, seed=m)
    weighting = jdcore.get_weighting(name, **({"c": C} if name == "cagrad" else {}))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.float16 and family.endswith("of all lengths"):
            continue  # squares of rows leave its range
        weights = weighting((rows @ rows.T).to(dtype))
        check_products(name, rows, weights.double() @ rows, dtype)


def check_products(
    name: str, rows: Tensor, vector: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """An update from products that are rounded to a dtype: bounded, and without large conflicts."""
    # Combinations of rows that are shorter than that are rounding of their products.
    visible = (len(rows) ** 0.5 * 0.5 * torch.finfo(dtype).eps) ** 0.5
    bounds = {"nash_mtl": 1.0, "fairgrad": len(rows) ** 0.5, "cagrad": 1.5, "imtl_g": math.inf}
    bound = bounds.get(name, 1.0) * (1.0 if name in UNSCALED else mean_length(rows))
    if name == "config":
        bound *= len(rows)  # it is as long as all projections together
    assert length(vector) <= 1.01 * bound
    if name in NON_CONFLICTING:
        assert float((rows @ vector / rows.norm(dim=1)).min()) >= -10.0 * visible * bound
