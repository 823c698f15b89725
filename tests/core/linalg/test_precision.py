"""What counts as rounding of the rows, and which combinations float32 factors cannot carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jdcore.aggregation import GramianAggregator, GramianSource
from jdcore.aggregation._columns import Columns, rounded_to
from jdcore.linalg import add_proximal, combine, gramian, proximal_level, rounding_shows


def test_the_level_grows_with_the_rounding_of_the_dtype_and_the_number_of_rows() -> None:
    assert proximal_level(8, torch.float64) == 8 * 2.0**-52
    assert proximal_level(8, torch.float32) == (32 * 2.0**-24) ** 2
    assert proximal_level(8, torch.bfloat16) == 2.0**-18
    assert proximal_level(8, torch.float16) == 2.0**-24
    assert proximal_level(100_000, torch.float32) == 100_000 * 2.0**-52
    assert proximal_level(4, torch.float32, products=torch.float32) == 4.0 * 2.0**-24
    assert proximal_level(4, torch.bfloat16, products=torch.float32) == 2.0**-18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_rounding_makes_of_a_combination_that_is_zero_is_below_the_level(
    dtype: torch.dtype,
) -> None:
    rows = torch.randn(6, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[5] = -rows[:5].sum(0)
    lengths = rows.norm(dim=1)
    unit = lengths / lengths.norm()  # a null vector of the unit rows, of length one

    remainder = (rows.to(dtype).double() / lengths[:, None]).T @ unit

    assert 0.0 < float(remainder @ remainder) < proximal_level(6, dtype)


def test_the_term_is_relative_to_the_squared_norm_of_each_row() -> None:
    given = np.array([[4.0, 1.0], [1.0, 1e-8]])

    definite = add_proximal(given, 0.5)

    np.testing.assert_allclose(definite, [[6.0, 1.0], [1.0, 1.5e-8]], rtol=1e-15)
    assert given[0, 0] == 4.0


@pytest.mark.parametrize("m", [3, 12])
def test_rows_that_cancel_need_float64_factors(m: int) -> None:
    rows = torch.randn(m, 50, generator=torch.Generator().manual_seed(1))
    rows[-1] = -rows[:-1].sum(0) + 1e-4 * torch.randn(
        50, generator=torch.Generator().manual_seed(2)
    )
    weights = torch.ones(m, dtype=torch.float64)
    G = gramian(rows)

    assert rounding_shows(weights, G)
    assert rounding_shows(1e-20 * weights, G)
    assert not rounding_shows(weights, torch.eye(m, dtype=torch.float64))
    assert not rounding_shows(torch.zeros(m, dtype=torch.float64), G)
    assert not rounding_shows(weights * torch.nan, G)
    exact = weights / 3.0 @ rows.double()
    combined = combine(weights / 3.0, rows, wide=True)
    torch.testing.assert_close(combined, exact.float(), rtol=2e-7, atol=0.0)
    # Of infinite rows without a weight nothing is to be said, also not by numpy.
    weights[0], G[0, 0] = 0.0, torch.inf
    assert not rounding_shows(weights, G)


def test_an_aggregator_combines_what_cancels_without_loss() -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    rows[2] = -rows[0] + 1e-5 * rows[1]
    weights = torch.tensor([1e5 / 3.0, 0.0, 1e5 / 3.0], dtype=torch.float64)

    vector = GramianAggregator(lambda G: weights)(rows)

    exact = weights @ rows.double()
    torch.testing.assert_close(vector, exact.float(), rtol=2e-7, atol=1e-30)


def test_converted_rows_are_known_to_the_dtype_that_they_come_from() -> None:
    random = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    few_digits = torch.tensor([[-4.0, 1.0, 1.0], [6e6, 1.0, 0.5]], dtype=torch.float64)
    leading_zeros = torch.cat([torch.zeros(4, 40), random.float()], dim=1).double()

    assert rounded_to(random) == torch.float64
    assert rounded_to(random.float()) == torch.float32
    assert rounded_to(random.float().double()) == torch.float32
    assert rounded_to(leading_zeros) == torch.float32
    assert rounded_to(random.half()) == torch.float16
    assert rounded_to(few_digits) == torch.float64
    assert rounded_to(torch.zeros(3, 0, dtype=torch.float64)) == torch.float64
    assert rounded_to(torch.full((2, 2), torch.nan, dtype=torch.float64)) == torch.float64
    assert Columns([random, random.bfloat16()]).rounded_to() == torch.bfloat16


def test_a_source_knows_the_level_of_its_rows() -> None:
    G = torch.eye(3)

    assert GramianSource.of(G).proximal_level == proximal_level(3, torch.float32, torch.float32)
    assert GramianSource.of(G.double()).proximal_level == proximal_level(3, torch.float64)
    converted = GramianSource(
        *(3, torch.float64, G.device, lambda: G.double()), rounded_to=lambda: torch.float32
    )
    assert converted.proximal_level == proximal_level(3, torch.float32)
