from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from tests.plugins.standard.test_weakly_stationary import rows_of


def draw(m: int, seed: int, n: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def test_the_direction_by_hand() -> None:
    # Typical lengths of a first call are the lengths: u = (1, 0) and (-.6, .8). At τ = 1/2, d is
    # u_1 + z u_2 with z = .5 + .6, that is (.34, .88).
    matrix = torch.tensor([[5.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)

    vector = get_aggregator("pcd", tau=0.5)(matrix)

    expected = torch.tensor([0.34, 0.88], dtype=torch.float64)
    torch.testing.assert_close(vector, 5 * expected / expected.norm())


def test_demands_that_are_met_leave_the_primary_gradient() -> None:
    matrix = torch.tensor([[5.0, 0.0], [3.0, 4.0]])

    torch.testing.assert_close(get_aggregator("pcd", tau=0.5)(matrix), matrix[0])


def test_typical_lengths_make_short_rows_demand_less() -> None:
    aggregator = get_aggregator("pcd", tau=1.0, beta=0.5)
    matrix = torch.eye(2, dtype=torch.float64)
    aggregator(matrix)

    # The averages are in the ratio of 1/4 + 1/2 and 1/4 + 1/8: u_2 has √(1/2) of the length of u_1,
    # and that is what d is to have along it.
    vector = aggregator(matrix * torch.tensor([[1.0], [0.5]]).double())

    expected = torch.tensor([1.0, 0.5**0.5], dtype=torch.float64)
    torch.testing.assert_close(vector, expected / expected.norm())


@pytest.mark.parametrize("m", [2, 3, 5, 12])
def test_the_conditions_of_the_nearest_direction_hold(m: int) -> None:
    for seed in range(5):
        matrix, tau = draw(m, seed), 0.3
        units = matrix / matrix.norm(dim=1, keepdim=True)
        vectors, weights = get_aggregator("pcd", tau=tau).aggregate_blocks([matrix])
        # In units where the first weight is that of u_1 alone.
        shares = weights * matrix.norm(dim=1)
        direction = shares @ units / shares[0]
        slack = units[1:] @ direction - tau

        assert float(slack.min()) >= -1e-12
        assert float(shares.min()) >= 0.0
        assert float((slack * shares[1:] / shares[0]).abs().max()) <= 1e-12
        assert float(vectors[0].norm()) == pytest.approx(float(matrix[0].norm()))


def test_demands_that_contradict_each_other_are_dropped() -> None:
    matrix = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, -3.0]])

    torch.testing.assert_close(get_aggregator("pcd", tau=0.1)(matrix), matrix[0])
    # Without progress to make, the two allow what is orthogonal to both.
    expected = torch.tensor([2.0**0.5, 0.0])
    torch.testing.assert_close(get_aggregator("pcd", tau=0.0)(matrix), expected)


def test_a_primary_gradient_of_zero_and_a_direction_of_zero_give_zero() -> None:
    assert not get_aggregator("pcd")(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).any()
    assert not get_aggregator("pcd", tau=0.0)(torch.tensor([[2.0, 0.0], [-3.0, 0.0]])).any()


def test_fractions_may_differ_by_objective() -> None:
    matrix = torch.eye(3, dtype=torch.float64)

    vector = get_aggregator("pcd", tau=torch.tensor([0.0, 1.0]))(matrix)

    assert vector.tolist() == pytest.approx([0.5**0.5, 0.0, 0.5**0.5])
    with pytest.raises(ParameterError, match="`tau` must be of length 1, the number of secondary"):
        get_aggregator("pcd", tau=torch.tensor([0.0, 1.0]))(matrix[:2])


@pytest.mark.parametrize("scale", [1e-30, 1e-200, 1e200])
def test_scales_that_change_far_out_of_range_keep_the_typical_lengths(scale: float) -> None:
    one, two = (get_aggregator("pcd", tau=0.5, beta=0.5) for _ in range(2))
    first, second = draw(3, 0), draw(3, 1)
    one(first)
    two(first * scale)

    torch.testing.assert_close(two(second * scale), one(second) * scale, rtol=1e-9, atol=0)
    # One that returns to an ordinary scale afterwards is typical of neither.
    two(second)
    assert two.weighting.lengths.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999])
def test_rows_whose_lengths_are_beyond_float64_are_those_of_any_other_scale(beta: float) -> None:
    one, two = (get_aggregator("pcd", tau=0.5, beta=beta) for _ in range(2))
    rows = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    expected, found = one(rows), two(rows * 4e307)
    torch.testing.assert_close(found / 4e307, expected, rtol=1e-9, atol=0)
    assert two(rows).isfinite().all()
    assert two.weighting.lengths.isfinite().all()


@pytest.mark.parametrize(
    ("tau", "error"),
    [
        (1.5, ParameterError),
        (-0.1, ParameterError),
        ("much", ParameterTypeError),
        (torch.tensor([0.5, 2.0]), ParameterError),
        (torch.tensor([[0.5]]), ParameterError),
        (torch.tensor([1]), ParameterError),
    ],
)
def test_unusable_fractions_are_refused(tau: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="`tau` must be"):
        get_weighting("pcd", tau=tau)


def test_weights_of_another_library() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    tau = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    ours = get_weighting("pcd", tau=tau, beta=0.8)
    theirs = torchjd.PCDWeighting(tau=tau, beta=0.8, eps=0.0)

    for seed in range(30):
        matrix = draw(4, seed)
        torch.testing.assert_close(ours(matrix @ matrix.T), theirs(matrix @ matrix.T))


@pytest.mark.parametrize("tau", [0.0, 0.02])
@pytest.mark.parametrize(("m", "n"), [(20, 10), (8, 4), (20, 100)])
@pytest.mark.parametrize("family", ["weakly stationary", "stationary", "opposite pairs"])
def test_where_rows_cancel_the_update_is_that_of_the_exact_rows(
    family: str, m: int, n: int, tau: float
) -> None:
    for seed in range(3):
        exact = rows_of(family, m, n, seed)
        rows = exact.float()
        # The first row is the primary one, whatever the order of the others.
        order = torch.cat(
            [torch.tensor([0]), 1 + torch.randperm(m - 1, generator=torch.Generator())]
        )
        scale = float(exact[0].norm())

        vector = get_aggregator("pcd", tau=tau)(rows).double()
        mixed = get_aggregator("pcd", tau=tau)(rows[order]).double()
        expected = get_aggregator("pcd", tau=tau)(exact)

        assert float((vector - mixed).norm()) <= 1e-4 * scale
        assert float((vector - expected).norm()) <= 1e-3 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opposite_demands_are_dropped_in_every_dtype(dtype: torch.dtype) -> None:
    # Rounding leaves directions that satisfy both, if it is taken for what the rows say.
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.7, 0.3], [1.0, 0.7, 0.3]]).double()
    rows[2] /= -3.0

    vector = get_aggregator("pcd", tau=0.5)(rows.to(dtype))

    torch.testing.assert_close(vector, rows[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_direction_that_is_rounding_of_the_rows_counts_as_zero(dtype: torch.dtype) -> None:
    row = torch.randn(1, 10, generator=torch.Generator().manual_seed(1))
    opposite = torch.cat([row, -row / 3]).to(dtype)

    assert not get_aggregator("pcd", tau=0.0)(opposite).any()


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_demands_of_nearly_opposite_rows_are_met(gap: float) -> None:
    # What has as much of both is long, and the shortest of it lies along the gap between them.
    matrix = torch.tensor([[0.0, 1.0], [gap, 1.0], [gap, -1.0]], dtype=torch.float64)

    vector = get_aggregator("pcd", tau=0.5)(matrix)

    torch.testing.assert_close(vector, torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("where", ["sparse", "meta"])
def test_fractions_without_entries_to_read_are_refused(where: str) -> None:
    tau = torch.tensor([0.5])

    with pytest.raises(ParameterError, match="`tau` must be in"):
        get_weighting("pcd", tau=tau.to_sparse() if where == "sparse" else tau.to(where))


def test_lengths_whose_averages_vanish_count_as_typical() -> None:
    rows = torch.tensor([[4.0, 4.0], [-8.0, 0.0]], dtype=torch.float64)
    last = torch.finfo(torch.float64).tiny * 2.0**-52

    expected = get_aggregator("pcd", tau=0.0)(rows)

    torch.testing.assert_close(get_aggregator("pcd", tau=0.0)(rows * last) / last, expected.round())
