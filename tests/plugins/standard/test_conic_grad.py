from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from jdcore import get_aggregator, get_solver
from jdcore.testing import family
from tests.plugins.standard.test_weakly_stationary import rows_of


def draw(name: str, m: int, n: int, seed: int) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(seed))


def cosine(one: Tensor, two: Tensor) -> float:
    return float(one @ two / (one.norm() * two.norm()))


def test_a_shortest_combination_inside_the_cone_gives_the_direction() -> None:
    matrix = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)

    vector = get_aggregator("conic_grad", c=0.5)(matrix)

    assert cosine(vector, get_aggregator("mgda")(matrix)) == pytest.approx(1.0)
    assert float(vector.norm()) == pytest.approx(float(matrix.mean(dim=0).norm()))


def test_at_the_border_by_hand() -> None:
    # The mean is (2, .5), of slope 1/4; the shortest combination has slope 4, outside of a cone
    # of 45 degrees. Its border is the slope tan(atan(1/4) + 45 degrees) = 5/3.
    matrix = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    vector = get_aggregator("conic_grad", c=math.sqrt(0.5))(matrix)

    assert float(vector[1] / vector[0]) == pytest.approx(5 / 3)
    assert float(vector.norm()) == pytest.approx(math.hypot(2.0, 0.5))


@pytest.mark.parametrize("c", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
def test_no_direction_of_the_cone_is_better(name: str, c: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        matrix = draw(name, 3, 4, seed)
        mean = matrix.mean(dim=0)
        vector = get_aggregator("conic_grad", c=c)(matrix)
        value = float((matrix @ vector / vector.norm()).min())
        assert float(vector.norm()) == pytest.approx(float(mean.norm()), rel=1e-9)
        assert cosine(vector, mean) >= c - 1e-9

        axis = mean / mean.norm()
        others = torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
        others -= (others @ axis)[:, None] * axis
        others /= others.norm(dim=1, keepdim=True)
        angles = torch.rand(20_000, 1, generator=generator, dtype=torch.float64) * math.acos(c)
        directions = angles.cos() * axis + angles.sin() * others
        best = float((directions @ matrix.T).min(dim=1).values.max())

        assert value >= best * (1 - 1e-9) or (best <= 0.0 and cosine(vector, mean) > 1 - 1e-12)


def test_where_nothing_in_the_cone_improves_all_the_update_is_the_mean() -> None:
    matrix = torch.tensor([[8.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)

    vector = get_aggregator("conic_grad", c=0.99)(matrix)

    torch.testing.assert_close(vector, matrix.mean(dim=0))


def test_rows_that_cancel_give_zero() -> None:
    matrix = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])

    assert get_aggregator("conic_grad")(matrix).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(20, 10), (20, 100)])
def test_rows_that_cancel_but_for_rounding_leave_the_mean(
    m: int, n: int, dtype: torch.dtype
) -> None:
    for seed in range(3):
        rows = rows_of("weakly stationary", m, n, seed).to(dtype)
        mean = rows.double().mean(0)

        vector = get_aggregator("conic_grad")(rows).double()

        eps = torch.finfo(dtype).eps
        assert float((vector - mean).norm()) <= max(8.0 * eps, 1e-12) * float(mean.norm())


def test_rows_of_very_different_lengths_are_no_stationary_point() -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1e6]])

    vector = get_aggregator("conic_grad", c=0.0)(matrix)

    assert cosine(vector.double(), torch.tensor([1.0, 1e-6]).double()) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_stationary_point_takes_no_search_and_gives_the_mean(dtype: torch.dtype) -> None:
    calls = []

    def counted(gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        calls.append(len(gramian))
        weights: NDArray[np.float64] = get_solver("min_norm", "native")(gramian)
        return weights

    rows = draw("gauss", 7, 40, seed=0)
    rows = torch.cat([rows, -rows[:4].sum(0, keepdim=True)]).to(dtype)
    vector = get_aggregator("conic_grad", solver=counted)(rows)

    torch.testing.assert_close(vector, rows.double().mean(0).to(dtype))
    assert len(calls) == 1
