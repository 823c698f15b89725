from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import jdcore
from jdcore import (
    ParameterError,
    ParameterTypeError,
    Stateful,
    UnsolvedWarning,
    get_aggregator,
    get_weighting,
)
from jdcore.testing import family
from jdplugins.standard._solvers import _gains
from tests.plugins.standard.dependent_rows import KINDS
from tests.plugins.standard.test_weakly_stationary import rows_of


def draw(name: str, m: int, n: int = 100, seed: int = 0) -> Tensor:
    return family(name, m, n, generator=torch.Generator().manual_seed(seed))


def test_orthogonal_rows_get_weights_inverse_to_their_lengths() -> None:
    # G = diag(g_i²), so g_i² α_i = 1/α_i.
    matrix = torch.diag(torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))

    weights = get_weighting("nash_mtl", max_norm=0.0)(matrix @ matrix.T)

    torch.testing.assert_close(weights, torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64))


def test_two_unit_rows_share_by_symmetry() -> None:
    # By symmetry α = (a, a) with a² (1 + c) = 1, where c is the cosine.
    cosine = -0.28
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)

    weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

    torch.testing.assert_close(weights, torch.full((2,), (1 + cosine) ** -0.5).double())


def test_the_equation_of_the_paper_with_asymmetric_rows() -> None:
    # α = (1, 2, 1/2) solves G α = 1/α = (1, 1/2, 2) for G = diag(s) + 0.1 (matrix of ones) with
    # s_i = (1/α_i - 0.35) / α_i, as 0.1 * (1 + 2 + 1/2) = 0.35.
    gramian = torch.diag(torch.tensor([0.65, 0.075, 3.3], dtype=torch.float64)) + 0.1

    weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16])
def test_the_residual_is_at_rounding_level_on_well_posed_problems(name: str, m: int) -> None:
    for seed in range(5):
        matrix = draw(name, m, seed=seed)
        gramian = matrix @ matrix.T
        weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

        assert float((weights * (gramian @ weights) - 1).abs().max()) <= 2e-11


def test_pairs_that_agree_to_four_digits_are_solved_as_far_as_the_gramian_tells() -> None:
    for m in (2, 4, 16):
        matrix = draw("neardup", m)
        gramian = matrix @ matrix.T
        weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

        assert float((weights * (gramian @ weights) - 1).abs().max()) <= 3e-6


def test_the_update_does_not_depend_on_the_lengths_of_the_rows() -> None:
    matrix = draw("gauss", 5)
    stretched = matrix * torch.tensor([1e-8, 1e8, 1.0, 3.0, 1e-3], dtype=torch.float64)[:, None]
    aggregator = get_aggregator("nash_mtl")

    torch.testing.assert_close(aggregator(stretched), aggregator(matrix), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_without_cap_the_weights_are_inverse_to_the_scale(scale: float) -> None:
    matrix = draw("gauss", 3)
    aggregator = get_aggregator("nash_mtl", max_norm=0.0)
    _, expected = aggregator.aggregate_blocks([matrix])

    _, weights = aggregator.aggregate_blocks([matrix * scale])

    torch.testing.assert_close(weights * scale, expected, rtol=1e-12, atol=0)


def test_the_update_has_the_length_max_norm_but_never_more_than_the_root_of_m() -> None:
    matrix = draw("conflict", 4)
    lengths = [
        float(get_aggregator("nash_mtl", max_norm=max_norm)(matrix).norm())
        for max_norm in (1.0, 0.5, 1e-3, 7.0, 0.0)
    ]

    assert lengths == pytest.approx([1.0, 0.5, 1e-3, 2.0, 2.0], rel=1e-9)


def test_opposite_rows_leave_the_game_to_the_others() -> None:
    # The rows e1 and -2 e1 are stationary; the third bargains in their orthogonal complement,
    # which it meets in e2.
    matrix = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [5.0, 3.0, 0.0]], dtype=torch.float64)

    vector = get_aggregator("nash_mtl", max_norm=0.0)(matrix)
    weights = get_weighting("nash_mtl", max_norm=0.0)(matrix @ matrix.T)

    torch.testing.assert_close(vector, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert bool((weights >= 0).all())
    assert float(weights.max()) < 10


def test_a_stationary_triangle_beside_two_other_rows() -> None:
    # Three rows in a plane that sum to zero, and two orthogonal rows with parts in that plane:
    # what remains of them has lengths 1 and 2 along e3 and e4.
    half, root = 0.5, math.sqrt(0.75)
    matrix = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0],
            [-half, root, 0.0, 0.0],
            [-half, -root, 0.0, 0.0],
            [4.0, -1.0, 1.0, 0.0],
            [0.3, 9.0, 0.0, 2.0],
        ],
        dtype=torch.float64,
    )

    vector = get_aggregator("nash_mtl", max_norm=0.0)(matrix)

    expected = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(vector, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [2, 8, 32])
def test_where_all_rows_are_stationary_the_update_is_zero_with_positive_weights(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, 60, generator=generator).double()
    mixture = torch.rand(m, 1, generator=generator).double() + 0.1
    rows[-1] = -(mixture[:-1] * rows[:-1]).sum(dim=0) / mixture[-1]

    for matrix in (rows, rows.float()):  # float32 rows are stationary up to rounding only
        vector = get_aggregator("nash_mtl")(matrix)
        _, weights = get_aggregator("nash_mtl").aggregate_blocks([matrix])

        assert float(vector.norm()) <= (1e-12 if matrix is rows else 1e-5)
        assert bool((weights > 0).all())


def test_zero_rows_get_weight_zero_and_the_others_bargain_alone() -> None:
    matrix = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])

    weights = get_weighting("nash_mtl", max_norm=0.0)(matrix @ matrix.T)

    torch.testing.assert_close(weights, torch.tensor([0.0, 1 / 3, 0.25]))


def test_duplicate_rows_share_the_weight_of_two_votes() -> None:
    # Two votes for e1, one for e2: maximise 2 log x1 + log x2 on |x|² = 3, so x² = (2, 1).
    matrix = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    vector = get_aggregator("nash_mtl", max_norm=0.0)(matrix)

    torch.testing.assert_close(vector, torch.tensor([math.sqrt(2.0), 1.0], dtype=torch.float64))


def test_weights_are_reused_between_updates_and_shortened_anew() -> None:
    first, second = draw("gauss", 3, seed=1), draw("gauss", 3, seed=2)
    weighting = get_weighting("nash_mtl", update_weights_every=2, max_norm=0.0)
    aggregator = get_aggregator("nash_mtl", update_weights_every=2, max_norm=1.0)
    alpha = weighting(first @ first.T)

    assert torch.equal(weighting(second @ second.T), alpha)
    assert not torch.equal(weighting(second @ second.T), alpha)
    aggregator(first)
    reused = alpha @ second
    torch.testing.assert_close(aggregator(second), reused / reused.norm())


def test_a_saved_state_continues_between_updates() -> None:
    matrices = [draw("gauss", 3, seed=s) for s in range(5)]
    one = get_aggregator("nash_mtl", update_weights_every=3)
    for matrix in matrices[:2]:
        one(matrix)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = get_aggregator("nash_mtl", update_weights_every=3)
    two.load_state_dict(torch.load(file, weights_only=True))

    for matrix in matrices[2:]:
        assert torch.equal(one(matrix), two(matrix))


def test_another_number_of_rows_between_updates_is_refused_and_changes_nothing() -> None:
    aggregator = get_aggregator("nash_mtl", update_weights_every=2)
    aggregator(draw("gauss", 3))
    before = repr(aggregator.state_dict())

    with pytest.raises(ParameterError, match=r"of 3 objectives.*got one of 4\. Call reset\(\)"):
        aggregator(draw("gauss", 4))

    assert repr(aggregator.state_dict()) == before
    aggregator.reset()
    aggregator(draw("gauss", 4))


def test_without_reuse_the_number_of_rows_may_change() -> None:
    aggregator = get_aggregator("nash_mtl")

    assert aggregator(draw("gauss", 3)).shape == aggregator(draw("gauss", 4)).shape


def test_n_tasks_may_be_given_as_first_argument_and_is_then_checked() -> None:
    cls = type(get_aggregator("nash_mtl"))
    aggregator = cls(3, max_norm=1.0, update_weights_every=1)
    assert isinstance(aggregator, Stateful)
    aggregator(draw("gauss", 3))

    with pytest.raises(ParameterError, match="`n_tasks` must be 4, the number of objectives"):
        aggregator(draw("gauss", 4))

    assert aggregator.state_dict()["calls"] == 1


def test_another_solver_takes_the_place_of_the_native_one() -> None:
    starts: list[np.ndarray | None] = []

    def first_only(gramian: np.ndarray, start: np.ndarray | None, level: float) -> np.ndarray:
        starts.append(start)
        return np.eye(len(gramian))[0]

    aggregator = get_aggregator("nash_mtl", solver=first_only, max_norm=0.0)
    matrix = draw("gauss", 3)

    assert torch.equal(aggregator(matrix), matrix[0])
    assert torch.equal(aggregator(matrix), matrix[0])
    # The weights of the call before are offered as a start.
    assert starts[0] is None
    assert starts[1] is not None
    assert starts[1].tolist() == [1.0, 0.0, 0.0]


def test_a_solver_that_raises_leaves_the_state_alone() -> None:
    def broken(gramian: np.ndarray, start: np.ndarray | None, level: float) -> np.ndarray:
        raise RuntimeError("no licence")

    aggregator = get_aggregator("nash_mtl", solver=broken)

    with pytest.raises(RuntimeError, match="no licence"):
        aggregator(draw("gauss", 3))
    assert aggregator.state_dict()["calls"] == 0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_norm", -1.0, ParameterError),
        ("max_norm", float("nan"), ParameterError),
        ("update_weights_every", 0, ParameterError),
        ("update_weights_every", 1.5, ParameterTypeError),
        ("n_tasks", 0, ParameterError),
        ("solver", "no_such_solver", LookupError),
    ],
)
def test_bad_arguments_are_refused_and_the_old_ones_kept(
    name: str, value: object, error: type[Exception]
) -> None:
    weighting = get_weighting("nash_mtl")
    old = getattr(weighting, name)

    with pytest.raises(error):
        get_weighting("nash_mtl", **{name: value})
    with pytest.raises(error):
        setattr(weighting, name, value)
    assert getattr(weighting, name) == old


@pytest.mark.parametrize(
    "name", ["gauss", "conflict", "neardup", "rankdef", "lowdim", "badscale", "special"]
)
def test_no_family_leaves_a_problem_unsolved(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsolvedWarning)
        for m in (2, 5, 16, 40):
            matrix = draw(name, m, n=20, seed=m)
            vector = get_aggregator("nash_mtl", max_norm=0.0)(matrix)
            norms = matrix.norm(dim=1).clamp(min=1e-300)

            assert float((matrix @ vector / norms).min()) >= -1e-9


@pytest.mark.parametrize("power", [30, 36, 41, 44])
def test_rows_that_are_almost_opposite_are_solved_as_long_as_the_gramian_tells_them_apart(
    power: int,
) -> None:
    # As for two unit rows above: α² = 1 / (1 + c), here exactly 2^power.
    cosine = 2.0**-power - 1.0
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)

    weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

    expected = torch.full((2,), 2.0 ** (power / 2), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=0.0)


def test_a_stationary_combination_of_very_different_parts_is_found() -> None:
    # e1 + g2 + 1e-4 e2 = 0 with g2 nearly opposite to e1; the last row bargains along e3.
    matrix = torch.zeros(4, 3, dtype=torch.float64)
    matrix[0, 0], matrix[1, 0], matrix[1, 1], matrix[2, 1] = 1.0, -1.0, -1e-4, 1.0
    matrix[3] = torch.tensor([0.5, 0.5, 2.0])

    vector = get_aggregator("nash_mtl", max_norm=0.0)(matrix)

    expected = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::jdcore.errors.UnsolvedWarning")
@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad"])
@pytest.mark.parametrize("m", [20, 70])
def test_rows_of_three_hundred_decades_raise_nothing(name: str, m: int) -> None:
    scales = 10.0 ** torch.linspace(-150.0, 150.0, m, dtype=torch.float64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(m, 1, dtype=torch.float64, generator=generator) * scales[:, None]
        assert jdcore.get_aggregator(name)(rows).isfinite().all()


def test_weights_are_reused_for_rows_whose_squares_leave_the_range() -> None:
    rows = torch.tensor([[1.0, 0.2], [0.1, 0.5]], dtype=torch.float64)
    aggregator = jdcore.get_aggregator("nash_mtl", update_weights_every=2)
    first = aggregator(rows)

    # The same weights give a longer update, which is shortened to the same length.
    torch.testing.assert_close(aggregator(rows * 1e200), first)


def _systems_solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the systems that Newton's method solves from now on."""
    sizes: list[int] = []
    solve = _gains.solve_definite

    def counted(*arguments: np.ndarray) -> np.ndarray:
        sizes.append(len(arguments[0]))
        return solve(*arguments)

    monkeypatch.setattr(_gains, "solve_definite", counted)
    return sizes


@pytest.mark.parametrize(("m", "n"), [(20, 10), (20, 100), (64, 10), (64, 30)])
@pytest.mark.parametrize("name", ["weakly stationary", "opposite pairs", "low rank"])
def test_stationary_rows_are_found_in_few_steps(
    name: str, m: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their shares grow to a million, where rounding decides how well the equation can be solved.
    steps = _systems_solved(monkeypatch)
    rows = rows_of(name, m, n, seed=0).float()
    get_aggregator("nash_mtl")(rows)
    assert len(steps) <= 35


def test_many_rows_that_do_not_depend_on_each_other_are_solved_by_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    systems = _systems_solved(monkeypatch)
    rows = draw("gauss", 160, 400).double()

    gramian = rows @ rows.T
    weights = get_weighting("nash_mtl", max_norm=0.0)(gramian)

    torch.testing.assert_close(weights * (gramian @ weights), torch.ones(160).double())
    assert not systems


@pytest.mark.parametrize(("name", "most"), [("nash_mtl", 6), ("fairgrad", 8)])
def test_independent_rows_take_few_systems(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fairness of any degree is not solved by way of Nash bargaining, nor what has a proximal term
    # to more digits than the next stage needs.
    systems = _systems_solved(monkeypatch)
    get_aggregator(name)(draw("gauss", 16, 32))
    assert len(systems) <= most


@pytest.mark.parametrize(
    "kind", ["low rank", "opposite", "integers", "sum of zero", "one row and its opposite"]
)
def test_rows_that_all_cancel_are_found_before_their_shares_are_large(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shares double in each step: 10 steps to a thousand, 20 to a million.
    def refused(*arguments: np.ndarray) -> np.ndarray:
        raise AssertionError("eigenvectors take ten times as long as a factorisation")

    monkeypatch.setattr(_gains, "spectrum", refused)
    systems = _systems_solved(monkeypatch)
    rows = torch.from_numpy(KINDS[kind](64, np.random.default_rng(1))).float()
    update = get_aggregator("nash_mtl")(rows)
    assert update.norm() <= 1e-5
    assert len(systems) <= 12


@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad"])
@pytest.mark.parametrize("gap", [1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 1e-9])
def test_pairs_that_are_nearly_opposite_conflict_with_nothing_at_any_gap(
    name: str, gap: float
) -> None:
    # Of gaps near 1e-6, some pairs count as opposite and some do not.
    for m in (4, 8, 16):
        rows = draw("gauss", m, 20)
        lengths = 10.0 ** torch.linspace(-1.0, 1.0, m // 2, dtype=torch.float64)
        rows[1::2] = gap * rows[1::2] - lengths[:, None] * rows[::2]
        update = get_aggregator(name)(rows)
        shortest = max(1.0, float(update.norm()))
        assert float((rows @ update / rows.norm(dim=1)).min()) >= -1e-5 * shortest


def test_weights_that_float64_cannot_hold_are_not_kept_for_the_next_call() -> None:
    rows = draw("gauss", 6, 12)
    aggregator = get_aggregator("nash_mtl", update_weights_every=2, max_norm=0.0)

    tiny = aggregator(rows * 2.0**-1030)

    assert bool(tiny.isfinite().all())
    assert aggregator.state_dict()["calls"] == 0
    expected = get_aggregator("nash_mtl", max_norm=0.0)(rows)
    torch.testing.assert_close(aggregator(rows), expected, rtol=1e-12, atol=0.0)
