from __future__ import annotations

import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator


def test_the_largest_and_the_smallest_entry_of_each_column_are_left_out() -> None:
    # Column 0 keeps 2 and 4, column 1 keeps 5 and 4.
    matrix = torch.tensor([[1.0, 9.0], [2.0, 5.0], [60.0, 4.0], [4.0, 1.0]])

    assert get_aggregator("trimmed_mean", trim_number=1)(matrix).tolist() == [3.0, 4.5]


def test_three_rows_trimmed_once_give_the_median() -> None:
    matrix = torch.tensor([[1.0, -3.0, 7.0], [5.0, -1.0, 7.0], [2.0, -2.0, 0.0]])

    assert get_aggregator("trimmed_mean", trim_number=1)(matrix).tolist() == [2.0, -2.0, 7.0]


def test_without_trimming_it_is_the_mean() -> None:
    matrix = torch.tensor([[1.0, 2.0], [4.0, 0.0]])

    assert get_aggregator("trimmed_mean", trim_number=0)(matrix).tolist() == [2.5, 1.0]


@pytest.mark.parametrize("trim_number", [1, 2, 3, 4])
@pytest.mark.parametrize("extra", range(1, 9))
def test_tournaments_and_sorting_select_the_same_entries(trim_number: int, extra: int) -> None:
    m = 2 * trim_number + extra
    generator = torch.Generator().manual_seed(m)
    # Few different values, so that ties are frequent.
    matrix = torch.randint(-3, 4, (m, 400), generator=generator).double()
    kept = matrix.sort(dim=0).values[trim_number : m - trim_number]

    vector = get_aggregator("trimmed_mean", trim_number=trim_number)(matrix)

    torch.testing.assert_close(vector, kept.mean(dim=0), rtol=1e-14, atol=1e-14)


def test_many_rows_are_sorted() -> None:
    matrix = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).double()

    vector = get_aggregator("trimmed_mean", trim_number=1)(matrix)

    torch.testing.assert_close(vector, matrix.sort(dim=0).values[1:-1].mean(dim=0))


def test_outliers_leave_no_trace_in_the_last_digit() -> None:
    matrix = torch.tensor([[0.1], [0.1], [0.1], [3e38], [-3e38]])

    assert torch.equal(get_aggregator("trimmed_mean", trim_number=1)(matrix), torch.tensor([0.1]))


def test_large_entries_do_not_overflow_in_the_sum() -> None:
    matrix = torch.full((5, 2), 3e38)

    torch.testing.assert_close(
        get_aggregator("trimmed_mean", trim_number=1)(matrix), torch.full((2,), 3e38)
    )


def test_nan_is_no_extreme_value_to_be_trimmed() -> None:
    matrix = torch.randn(5, 3)
    matrix[2, 1] = float("nan")

    assert bool(get_aggregator("trimmed_mean", trim_number=2)(matrix).isnan().all())


def test_too_few_rows_are_refused_with_the_reason() -> None:
    aggregator = get_aggregator("trimmed_mean", trim_number=2)

    with pytest.raises(ParameterError, match=r"at least 5 rows \(2 trim_number \+ 1\), got 4"):
        aggregator(torch.randn(4, 3))


def test_a_bad_trim_number_is_refused_and_the_old_one_kept() -> None:
    aggregator = get_aggregator("trimmed_mean", trim_number=2)

    with pytest.raises(ParameterError, match="`trim_number` must be >= 0, got -1"):
        aggregator.trim_number = -1
    with pytest.raises(ParameterTypeError, match="`trim_number` must be an int"):
        get_aggregator("trimmed_mean", trim_number=1.0)
    assert aggregator.trim_number == 2
