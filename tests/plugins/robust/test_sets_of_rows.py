"""Methods that choose rows by the distances between them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from jdplugins.robust.smea import _sets


def column(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)[:, None]


def drawn(seed: int, m: int, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def test_multi_krum_averages_all_but_the_rows_far_from_their_neighbours() -> None:
    # Squared distances to the two nearest: 1 + 4, 1 + 1, 1 + 4, 9 + 16, huge.
    rows = column(1, 2, 3, 6, 1000)

    assert get_aggregator("multi_krum", n_byzantine=1)(rows).tolist() == pytest.approx([3.0])
    assert get_aggregator("multi_krum", n_byzantine=1, n_selected=1)(
        rows
    ).tolist() == pytest.approx([2.0])
    assert get_aggregator("multi_krum", n_byzantine=1, n_selected=3)(
        rows
    ).tolist() == pytest.approx([2.0])


def test_multi_krum_agrees_with_krum_of_squared_distances() -> None:
    for seed in range(5):
        rows = drawn(seed, 9)
        several = get_aggregator("multi_krum", n_byzantine=2, n_selected=3)
        expected = _krum(rows, 2, 3)

        torch.testing.assert_close(several(rows), expected)


def _krum(rows: Tensor, f: int, selected: int) -> Tensor:
    scores = torch.cdist(rows, rows).square().sort(dim=1).values[:, 1 : len(rows) - f - 1].sum(1)
    return rows[scores.argsort()[:selected]].mean(0)


def test_the_nearest_neighbours_of_the_trusted_row_are_averaged() -> None:
    rows = column(1, 2, 6)

    assert get_aggregator("monna", n_byzantine=1, trusted=0)(rows).tolist() == pytest.approx([1.5])
    assert get_aggregator("monna", n_byzantine=1, trusted=2)(rows).tolist() == pytest.approx([4.0])
    assert get_weighting("monna", n_byzantine=2, trusted=4)(torch.ones(5, 5))[4] > 0


def test_the_set_with_the_least_diameter_is_averaged() -> None:
    assert get_aggregator("mda", n_byzantine=2)(column(0, 1, 2, 4, 1000)).tolist() == pytest.approx(
        [1.0]
    )
    assert get_aggregator("mda", n_byzantine=1)(column(0, 10, 11, 12)).tolist() == pytest.approx(
        [11.0]
    )


def test_of_sets_with_the_least_diameter_the_denser_one_is_averaged() -> None:
    # Either of the last two rows can be left out; then (1, 0) and (0, 0) are the farthest pair.
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.6], [0.5, -0.59]], dtype=torch.float64)

    torch.testing.assert_close(get_aggregator("mda", n_byzantine=1)(rows), rows[[0, 1, 3]].mean(0))


def test_many_equal_distances_leave_a_set_of_the_right_size() -> None:
    weights = get_weighting("mda", n_byzantine=2)(torch.eye(7))

    assert sorted(weights.tolist()) == pytest.approx([0.0, 0.0] + [0.2] * 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), f=st.integers(0, 3), extra=st.integers(1, 4))
def test_no_set_has_a_smaller_diameter(seed: int, f: int, extra: int) -> None:
    m = 2 * f + extra
    rows = drawn(seed, m, 3)
    weights = get_weighting("mda", n_byzantine=f)(rows @ rows.T)
    distances = torch.cdist(rows, rows)
    chosen = weights.nonzero().flatten()

    diameters = [float(distances[list(s)][:, list(s)].max()) for s in combinations(range(m), m - f)]
    assert len(chosen) == m - f
    assert float(distances[chosen][:, chosen].max()) <= min(diameters) * (1 + 1e-12)


def test_the_least_diameter_of_many_rows_is_found_quickly() -> None:
    # 10^13 sets of rows: only a search over the few that can be left out comes to an end.
    rows = drawn(0, 60, 30)
    rows[:9] += 100.0 * drawn(1, 9, 30)
    weights = get_weighting("mda", n_byzantine=9)(rows @ rows.T)

    assert not weights[:9].any()
    assert int((weights > 0).sum()) == 51


def test_the_set_with_the_least_variance_is_averaged() -> None:
    assert get_aggregator("smea", n_byzantine=1)(column(0, 1, 2, 1000)).tolist() == pytest.approx(
        [1.0]
    )
    # Without the first row the variance is the same in both directions.
    rows = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]).double()
    torch.testing.assert_close(
        get_aggregator("smea", n_byzantine=1)(rows), torch.zeros(2, dtype=torch.float64)
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), f=st.integers(0, 3), extra=st.integers(1, 3))
def test_no_set_has_a_smaller_variance(seed: int, f: int, extra: int) -> None:
    m = 2 * f + extra
    rows = drawn(seed, m, 4)
    weights = get_weighting("smea", n_byzantine=f)(rows @ rows.T)

    variances = [variance(rows[list(s)]) for s in combinations(range(m), m - f)]
    assert variance(rows[weights > 0]) <= min(variances) * (1 + 1e-9) + 1e-15


def variance(rows: Tensor) -> float:
    centred = rows - rows.mean(0)
    return float(torch.linalg.eigvalsh(centred.T @ centred)[-1])


def test_more_sets_than_can_be_tried_are_refused_with_a_way_out() -> None:
    with pytest.raises(ParameterError, match=r"20 of 60 rows.*Choose CAF"):
        get_aggregator("smea", n_byzantine=20)(drawn(0, 60))


@pytest.mark.parametrize(("m", "f", "together"), [(20, 3, 1024), (301, 1, 46), (3000, 1, 1)])
def test_sets_come_in_portions_whose_matrices_fit_into_memory(
    m: int, f: int, together: int
) -> None:
    assert next(_sets(m, m - f)).shape == (together, m - f)


def test_a_row_alone_in_the_direction_of_the_largest_variance_loses_its_weight() -> None:
    # By hand: from the mean 200, tau = 4e4 for the zeros and 6.4e5 for the outlier, which goes.
    weights = get_weighting("caf", n_byzantine=2)(
        column(0, 0, 0, 0, 1000) @ column(0, 0, 0, 0, 1000).T
    )

    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_rows_lose_the_same_weight_at_any_scale(scale: float) -> None:
    rows = drawn(0, 7)

    vector = get_aggregator("caf", n_byzantine=2)(rows * scale) / scale

    torch.testing.assert_close(vector, get_aggregator("caf", n_byzantine=2)(rows))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), f=st.integers(0, 3), extra=st.integers(1, 4))
def test_the_filter_in_gramian_form_is_that_of_the_paper(seed: int, f: int, extra: int) -> None:
    rows = drawn(seed, 2 * f + extra, 6)

    torch.testing.assert_close(get_aggregator("caf", n_byzantine=f)(rows), filtered(rows, f))


def filtered(rows: Tensor, f: int) -> Tensor:
    """The algorithm on the rows themselves, with their covariance."""
    m = len(rows)
    masses, least, best = torch.ones(m, dtype=torch.float64), np.inf, rows.mean(0)
    while masses.sum() > m - 2 * f:
        mean = masses @ rows / masses.sum()
        centred = rows - mean
        values, vectors = torch.linalg.eigh((centred * masses[:, None]).T @ centred / masses.sum())
        if values[-1] < least:
            least, best = float(values[-1]), mean
        deviations = (centred @ vectors[:, -1]).square()
        masses = masses * (1 - deviations / deviations[masses > 0].max()).clamp(min=0)
    return best


@pytest.mark.parametrize("name", ["multi_krum", "mda", "monna", "smea", "caf"])
def test_too_few_rows_are_refused_with_the_reason(name: str) -> None:
    least = {"multi_krum": r"6 rows \(n_byzantine \+ 3\)"}.get(
        name, r"7 rows \(2 n_byzantine \+ 1\)"
    )

    with pytest.raises(ParameterError, match=rf"`gramian` must be of at least {least}, got 5 rows"):
        get_aggregator(name, n_byzantine=3)(drawn(0, 5))


def test_a_trusted_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"at least 8 rows \(trusted \+ 1\)"):
        get_aggregator("monna", n_byzantine=1, trusted=7)(drawn(0, 5))


@pytest.mark.parametrize("name", ["multi_krum", "mda", "monna", "smea", "caf", "meamed"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ParameterError), (1.0, ParameterTypeError), (True, ParameterTypeError)],
)
def test_a_bad_number_of_adversaries_is_refused_and_the_old_one_kept(
    name: str, value: object, error: type[Exception]
) -> None:
    aggregator = get_aggregator(name, n_byzantine=1)
    owner = getattr(aggregator, "weighting", aggregator)

    with pytest.raises(error, match="`n_byzantine`"):
        get_aggregator(name, n_byzantine=value)
    with pytest.raises(error, match="`n_byzantine`"):
        owner.n_byzantine = value
    assert owner.n_byzantine == 1
