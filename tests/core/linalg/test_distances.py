from __future__ import annotations

import numpy as np

from jdcore.linalg import lowest, squared_distances


def test_distances_are_those_of_the_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3))
    expected = ((rows[:, None] - rows) ** 2).sum(axis=2)

    np.testing.assert_allclose(squared_distances(rows @ rows.T), expected, atol=1e-14)


def test_equal_rows_have_no_distance_and_rounding_makes_none_negative() -> None:
    rows = np.random.default_rng(1).standard_normal((1, 1000)).repeat(4, axis=0)
    distances = squared_distances(rows @ rows.T)

    assert (distances >= 0.0).all()
    assert distances.max() <= 1e-12
    assert not np.diagonal(distances).any()


def test_one_huge_row_costs_the_others_no_digit() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [1e100, 0.0]])

    assert squared_distances(rows @ rows.T)[0, 1] == 2.0


def test_the_lowest_scores_are_the_first_of_those_that_rounding_tells_apart() -> None:
    third = 0.1 + 0.2
    scores = np.array([5.0, third, 0.3, 0.1, third, 0.3])

    assert lowest(scores, 1).tolist() == [3]
    assert lowest(scores, 3).tolist() == [3, 1, 2]
    assert sorted(lowest(scores, 5).tolist()) == [1, 2, 3, 4, 5]
    assert sorted(lowest(scores, 6).tolist()) == [0, 1, 2, 3, 4, 5]
    assert lowest(np.array([0.0, -1.0, 0.0]), 1).tolist() == [1]


def test_scores_that_overflowed_are_taken_like_any_others() -> None:
    assert lowest(np.full(3, np.inf), 2).tolist() == [0, 1]
    assert lowest(np.array([np.inf, np.inf, 1.0]), 2).tolist() == [2, 0]
