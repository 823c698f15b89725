from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting


def column(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)[:, None]


def test_the_row_closest_to_its_neighbours_is_selected() -> None:
    # Two neighbours count: 1+3, 1+2, 2+3 (of 0, 1, 3) and 3+5, ... have scores 4, 3, 5, 8, ...
    vector = get_aggregator("krum", n_byzantine=1)(column(0, 1, 3, 6, 1000))

    assert vector.tolist() == [1.0]


def test_multi_krum_averages_the_best_rows() -> None:
    # Scores as above: the rows 1 and 0 are the best two.
    vector = get_aggregator("krum", n_byzantine=1, n_selected=2)(column(0, 1, 3, 6, 1000))

    assert vector.tolist() == [0.5]


def test_squared_distances_can_select_another_row() -> None:
    # Distances to the two nearest: 1 and 7 for the row 1 (sum 8, squares 50), 4.5 twice for the row
    # 12.5 (sum 9, squares 40.5); all other rows are worse in both.
    rows = column(0, 1, 8, 12.5, 17)

    assert get_aggregator("krum", n_byzantine=1)(rows).tolist() == [1.0]
    assert get_aggregator("krum", n_byzantine=1, squared=True)(rows).tolist() == [12.5]


def test_adversarial_rows_are_ignored_however_large() -> None:
    honest = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    bad = torch.full((2, 30), 1e30)

    weights = get_weighting("krum", n_byzantine=2, n_selected=3)(
        torch.cat([bad, honest]).double() @ torch.cat([bad, honest]).double().T
    )

    assert weights[:2].tolist() == [0.0, 0.0]
    assert int((weights > 0).sum()) == 3


def test_of_equal_scores_the_first_rows_are_taken() -> None:
    weights = get_weighting("krum", n_byzantine=0, n_selected=2)(torch.eye(4))

    assert weights.tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_of_scores_that_rounding_tells_apart_the_first_rows_are_taken(name: str) -> None:
    if name == "multi_krum":
        pytest.importorskip("jdplugins.robust")
    # Two neighbours at one step each, but for the rows at either end.
    rows = 0.1 * torch.arange(8.0, dtype=torch.float64)[:, None]
    aggregator = get_aggregator(name, n_byzantine=4, n_selected=1)

    for seed in range(50):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        first = next(row for row in order if 0 < row < 7)
        assert torch.equal(aggregator(rows[order]), rows[first])


def test_too_few_rows_are_refused_with_the_reason() -> None:
    with pytest.raises(ParameterError, match=r"at least 5 rows \(n_byzantine \+ 3\), got 4 rows"):
        get_aggregator("krum", n_byzantine=2)(torch.randn(4, 3))
    with pytest.raises(ParameterError, match=r"at least 9 rows \(n_selected\), got 4 rows"):
        get_aggregator("krum", n_byzantine=1, n_selected=9)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_byzantine", -1, ParameterError),
        ("n_byzantine", 1.0, ParameterTypeError),
        ("n_selected", 0, ParameterError),
        ("squared", 1, ParameterTypeError),
        ("squared", None, ParameterTypeError),
    ],
)
def test_bad_arguments_are_refused_and_the_old_ones_kept(
    name: str, value: object, error: type[Exception]
) -> None:
    weighting = get_weighting("krum", n_byzantine=1)
    old = getattr(weighting, name)

    with pytest.raises(error, match=f"`{name}`"):
        get_weighting("krum", **{"n_byzantine": 1, name: value})
    with pytest.raises(error, match=f"`{name}`"):
        setattr(weighting, name, value)
    assert getattr(weighting, name) == old
