from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, UnsolvedWarning, get_aggregator, get_weighting
from jdcore.testing import FAMILIES, family


def draw(name: str, m: int, n: int = 100, seed: int = 0) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(seed))


def residual(matrix: Tensor, alpha: float) -> float:
    """How far gains are from what they are to be, relative to the terms that make them up."""
    gramian = matrix @ matrix.T
    weights = get_weighting("fairgrad", alpha=alpha)(gramian)
    wanted = weights ** (-1.0 / alpha)
    scale = wanted + gramian.abs() @ weights
    return float(((gramian @ weights - wanted) / scale).abs().max())


@pytest.mark.parametrize(("alpha", "power"), [(0.5, -2 / 3), (1.0, -1.0), (2.0, -4 / 3)])
def test_orthogonal_rows_have_a_closed_form(alpha: float, power: float) -> None:
    # g² w = w^(-1/alpha), so w is g to the power of -2 alpha / (1 + alpha).
    lengths = torch.tensor([100.0, 1.0, 8.0], dtype=torch.float64)

    weights = get_weighting("fairgrad", alpha=alpha)(torch.diag(lengths**2))

    torch.testing.assert_close(weights, lengths**power)


def test_the_equation_of_the_paper_with_asymmetric_rows() -> None:
    # alpha = 2: w = (1, 4, 1/4) solves G w = w^(-1/2) = (1, 1/2, 2) for G = diag(s) + 0.01 (ones)
    # with s_i = (w_i^(-1/2) - 0.0525) / w_i, as 0.01 (1 + 4 + 1/4) = 0.0525.
    weights = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    gramian = torch.diag((weights**-0.5 - 0.0525) / weights) + 0.01

    torch.testing.assert_close(get_weighting("fairgrad", alpha=2.0)(gramian), weights)


def test_no_fairness_is_the_mean() -> None:
    matrix = draw("gauss", 3)

    assert torch.equal(
        get_aggregator("fairgrad", alpha=0.0)(matrix), get_aggregator("mean")(matrix)
    )


@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
def test_proportional_fairness_is_nash_bargaining(name: str) -> None:
    for m in (1, 2, 3, 8):
        gramian = draw(name, m) @ draw(name, m).T
        nash = get_weighting("nash_mtl", max_norm=0.0)(gramian)

        torch.testing.assert_close(get_weighting("fairgrad", alpha=1.0)(gramian), nash)


@pytest.mark.parametrize("alpha", [20.0, 1e3])
@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
def test_a_large_degree_lets_rows_that_gain_enough_go_without_weight(
    name: str, alpha: float
) -> None:
    for m in (2, 4, 8, 32):
        gramian = draw(name, m, n=2 * m) @ draw(name, m, n=2 * m).T
        weights = get_weighting("fairgrad", alpha=alpha)(gramian)
        gains = gramian @ weights
        # What is beyond the range of float64 is zero.
        expected = torch.exp(-alpha * gains.log())
        # Gains are known as exactly as their terms.
        known = 1e-12 * alpha * (gramian.abs() @ weights) / gains
        assert bool(((weights - expected).abs() <= known * weights + 1e-9 * weights.max()).all())


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("name", ["gauss", "conflict"])
def test_the_residual_is_at_rounding_level_on_well_posed_problems(name: str, alpha: float) -> None:
    for m in (1, 2, 3, 8, 32):
        for seed in range(3):
            assert residual(draw(name, m, seed=seed), alpha) <= 1e-10


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_rows_of_very_different_lengths_are_solved(alpha: float) -> None:
    for m in (2, 4, 8):
        assert residual(draw("badscale", m), alpha) <= 1e-10


def test_large_alpha_approaches_equal_gains() -> None:
    matrix = draw("gauss", 4)

    gains = matrix @ get_aggregator("fairgrad", alpha=1e4)(matrix)

    torch.testing.assert_close(gains / gains.mean(), torch.ones(4).double(), rtol=1e-3, atol=0)


def test_stationary_rows_leave_the_others_to_share_beside_them() -> None:
    # e1 and -2 e1 are stationary; the others, 3 and 2 long beside them, share as orthogonal rows.
    matrix = torch.tensor(
        [[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [5.0, 3.0, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64
    )

    vector = get_aggregator("fairgrad", alpha=2.0)(matrix)

    # w = g^(-4/3), so the update along each is g^(-1/3).
    expected = torch.tensor([0.0, 3 ** (-1 / 3), 2 ** (-1 / 3)], dtype=torch.float64)
    torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize("m", [80, 96, 128])
def test_many_multiples_of_one_row_cancel(m: int, noise: float, alpha: float) -> None:
    random = torch.Generator().manual_seed(0)
    matrix, signs = torch.randn((2, m, 2 * m), generator=random, dtype=torch.float64)
    matrix = signs[:, :1] * (matrix[0] + noise * matrix)

    weights = get_weighting("fairgrad", alpha=alpha)(matrix @ matrix.T)

    rows = weights[:, None] * matrix
    assert weights.gt(0.0).all()
    assert rows.sum(0).norm() < 1e-6 * rows.norm(dim=1).sum()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_no_family_leaves_a_problem_unsolved(name: str, alpha: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        for m in (2, 5, 16):
            matrix = draw(name, m, n=20, seed=m)
            weights = get_weighting("fairgrad", alpha=alpha)(matrix @ matrix.T)
            assert bool((weights >= 0).all())


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_weights_have_the_degree_that_they_say(scale: float, alpha: float) -> None:
    matrix = draw("gauss", 3)
    aggregator = get_aggregator("fairgrad", alpha=alpha)
    _, expected = aggregator.aggregate_blocks([matrix])

    _, weights = aggregator.aggregate_blocks([matrix * scale])

    degree = -2 * alpha / (1 + alpha)
    torch.testing.assert_close(weights, expected * scale**degree, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_updates_are_right_where_weights_leave_the_range(scale: float, alpha: float) -> None:
    matrix = draw("gauss", 3)
    aggregator = get_aggregator("fairgrad", alpha=alpha)
    expected = aggregator(matrix) * scale ** ((1.0 - alpha) / (1.0 + alpha))

    periodic = get_aggregator("periodic", weighting=aggregator.weighting, every=2)
    # Weights that cannot be kept are asked for again.
    for found in (aggregator, periodic, periodic):
        torch.testing.assert_close(found(matrix * scale), expected, rtol=1e-9, atol=0.0)


def test_another_solver_takes_the_place_of_the_native_one() -> None:
    def first_only(gramian: np.ndarray, alpha: float, level: float) -> np.ndarray:
        assert alpha == 3.0
        return np.eye(len(gramian))[0]

    matrix = draw("gauss", 3)

    assert torch.equal(get_aggregator("fairgrad", alpha=3.0, solver=first_only)(matrix), matrix[0])


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_unusable_degrees_are_refused(alpha: float) -> None:
    with pytest.raises(ParameterError, match="`alpha` must be >= 0"):
        get_aggregator("fairgrad", alpha=alpha)


def test_weights_of_another_library() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("scipy")
    for alpha in (0.5, 1.0, 2.0):
        for seed in range(3):
            gramian = draw("gauss", 4, seed=seed) @ draw("gauss", 4, seed=seed).T
            theirs = torchjd.FairGradWeighting(alpha=alpha)(gramian)
            ours = get_weighting("fairgrad", alpha=alpha)(gramian)
            # It stops at 1e-8 of its own measure.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
def test_powers_of_norms_that_leave_the_range_do_no_harm(alpha: float) -> None:
    rows = torch.tensor([[1e5, 0, 0], [3, 1, 0], [0, 1e-5, 1e-5]], dtype=torch.float64)
    gramian = rows @ rows.T

    weights = get_weighting("fairgrad", alpha=alpha)(gramian)

    torch.testing.assert_close(weights, (gramian @ weights) ** -alpha)


def test_a_fairness_beyond_what_float64_can_solve_warns() -> None:
    with pytest.warns(UnsolvedWarning, match="fair_allocation") as caught:
        weights = get_weighting("fairgrad", alpha=1e-300)(torch.tensor([[1.0, 0.9], [0.9, 0.85]]))
    assert caught[0].filename == __file__
    assert weights.isfinite().all()
    assert bool((weights >= 0).all())


@pytest.mark.parametrize("m", [3, 12])
def test_rows_of_all_lengths_give_finite_weights_that_are_right_or_warned_of(m: int) -> None:
    random = torch.Generator().manual_seed(m)
    for _ in range(12):
        rows = torch.randn((m, 2 * m), generator=random, dtype=torch.float64)
        exponents = 280.0 * torch.rand((m, 1), generator=random, dtype=torch.float64) - 140.0
        matrix = rows * 10.0**exponents
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = get_weighting("fairgrad", alpha=10.0)(matrix @ matrix.T)

        assert weights.isfinite().all()
        # A gain that is negative by more than rounding is that of no allocation.
        lengths = matrix.norm(dim=1)
        units, shares = matrix / lengths[:, None], weights * lengths
        gains, sizes = units @ units.T @ shares, (units @ units.T).abs() @ shares
        assert caught or (gains >= -1e-9 * sizes).all()


def test_degrees_without_an_inverse_are_refused() -> None:
    with pytest.raises(ParameterError, match="`alpha` must be 0, or a number that has an inverse"):
        get_weighting("fairgrad", alpha=1e-320)


@pytest.mark.parametrize("alpha", [5.0, 10.0, 20.0])
def test_large_shares_of_nearly_opposite_rows_do_not_stop_the_small_ones(alpha: float) -> None:
    # Rounding leaves more of the gains of the former than all that the latter have to gain.
    for seed in range(20):
        matrix = draw("gauss", 4, 6, seed).double()
        matrix[0] = 2e-6 * matrix[0] - matrix[1]

        vector = get_aggregator("fairgrad", alpha=alpha)(matrix)  # which warns of what is unsolved

        lengths = matrix.norm(dim=1) * vector.norm()
        assert float((matrix @ vector / lengths).min()) >= -1e-6


@pytest.mark.parametrize("name", ["gauss", "conflict", "neardup", "badscale"])
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001, 1e-4, 1e-6])
def test_little_fairness_is_solved_as_well(name: str, alpha: float) -> None:
    # What is spent is the power 1/alpha of a share, which the rounding of the share changes by
    # 1/alpha times as much. A warning would be an error.
    for m in (2, 3, 8, 12, 32):
        assert residual(draw(name, m).double(), alpha) < 1e-12 + 4e-15 / alpha


def test_little_fairness_of_rows_of_all_lengths_is_solved() -> None:
    # Gains of other rows must not hide that a share has become so small that it is worth a power
    # of 99 of what it was.
    for seed in (0, 1, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        matrix = family("gauss", 64, 65, generator=generator).double()
        matrix *= 10.0 ** (6.0 * torch.rand(64, 1, dtype=torch.float64, generator=generator) - 3.0)

        assert residual(matrix, 0.01) <= 1e-9


def test_little_fairness_of_conflicting_rows_by_hand() -> None:
    # G = [[1, -1/2], [-1/2, 1]]: both weights are w with w / 2 = w^(-1000), w = 2^(1/1001).
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)

    weights = get_weighting("fairgrad", alpha=0.001)(gramian)

    torch.testing.assert_close(weights, torch.full((2,), 2.0 ** (1 / 1001), dtype=torch.float64))
