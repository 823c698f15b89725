from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, ParameterTypeError, get_aggregator


def always_positive(purity: Tensor) -> Tensor:
    return torch.full_like(purity, 2.0)


def always_negative(purity: Tensor) -> Tensor:
    return torch.full_like(purity, -1.0)


MATRIX = torch.tensor([[1.0, -2.0, 3.0, 0.0], [2.0, 1.0, -4.0, 0.0], [-4.0, -1.0, 0.5, 0.0]])


def test_the_entries_of_one_sign_are_summed() -> None:
    positive = get_aggregator("graddrop", f=always_positive)(MATRIX)
    negative = get_aggregator("graddrop", f=always_negative)(MATRIX)

    assert positive.tolist() == [3.0, 1.0, 3.5, 0.0]
    assert negative.tolist() == [-4.0, -3.0, -4.0, 0.0]


def test_positive_entries_are_kept_with_probability_of_the_sign_purity() -> None:
    # Entries 1, -2, 4: P = (1 + 3/7) / 2 = 5/7, sums 5 and -2. The standard error is 0.002.
    matrix = torch.tensor([[1.0], [-2.0], [4.0]]).expand(3, 50_000)
    generator = torch.Generator().manual_seed(0)

    vector = get_aggregator("graddrop", generator=generator)(matrix)

    assert set(vector.tolist()) == {5.0, -2.0}
    assert float((vector == 5.0).double().mean()) == pytest.approx(5 / 7, abs=0.01)


def test_columns_of_one_sign_are_never_changed() -> None:
    matrix = torch.rand(7, 30_000, generator=torch.Generator().manual_seed(1)).double()
    aggregator = get_aggregator("graddrop")

    torch.testing.assert_close(aggregator(matrix), matrix.sum(dim=0))
    torch.testing.assert_close(aggregator(-matrix), -matrix.sum(dim=0))


def test_the_purity_is_what_the_function_gets() -> None:
    seen: list[Tensor] = []

    def record(purity: Tensor) -> Tensor:
        seen.append(purity)
        return purity

    get_aggregator("graddrop", f=record)(MATRIX.double())

    # Sums 3 of 7, 1 of 4, 3.5 of 7.5 are positive; a column of zeros has no sign.
    expected = torch.tensor([3 / 7, 1 / 4, 3.5 / 7.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(seen), expected)


def test_the_purity_does_not_depend_on_the_scale_down_to_the_last_numbers() -> None:
    always_larger = get_aggregator("graddrop", f=lambda purity: (purity > 0.5).to(purity.dtype))
    matrix = torch.tensor([[3.0, 1.0], [-2.0, -4.0]], dtype=torch.float64)

    for scale in (1.0, 2.0**-1060):
        assert (always_larger(matrix * scale) / scale).tolist() == [3.0, -4.0]


def test_leaks_let_a_part_of_the_rows_through() -> None:
    # Column (1, -2) with leaks (1/2, 0): 1/2 leaks, of the rest (1/2, -2) one sign is kept.
    matrix = torch.tensor([[1.0], [-2.0]])
    leak = torch.tensor([0.5, 0.0])

    assert get_aggregator("graddrop", f=always_positive, leak=leak)(matrix).tolist() == [1.0]
    assert get_aggregator("graddrop", f=always_negative, leak=leak)(matrix).tolist() == [-1.5]


def test_a_full_leak_is_the_sum() -> None:
    vector = get_aggregator("graddrop", leak=torch.ones(3))(MATRIX)

    torch.testing.assert_close(vector, MATRIX.sum(dim=0))


def test_the_generator_decides() -> None:
    matrix = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    first, same, other = (
        get_aggregator("graddrop", generator=torch.Generator().manual_seed(s))(matrix)
        for s in (1, 1, 2)
    )

    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_leak_has_to_fit_the_rows_and_the_device() -> None:
    aggregator = get_aggregator("graddrop", leak=torch.ones(2))

    with pytest.raises(ParameterError, match="`leak` must be of length 3"):
        aggregator(MATRIX)
    aggregator.leak = torch.ones(3, device="meta")
    with pytest.raises(ParameterError, match="`leak` must be on cpu"):
        aggregator(MATRIX)


def test_a_function_that_changes_the_shape_is_refused() -> None:
    aggregator = get_aggregator("graddrop", f=lambda purity: purity.mean())

    with pytest.raises(ParameterError, match="`f` must be a function that keeps the shape"):
        aggregator(MATRIX)


def test_bad_arguments_are_refused_and_the_old_ones_kept() -> None:
    leak = torch.zeros(3)
    aggregator = get_aggregator("graddrop", f=always_positive, leak=leak)

    with pytest.raises(ParameterTypeError, match="`f` must be a function of a Tensor"):
        aggregator.f = 0.5
    with pytest.raises(ParameterTypeError, match="`leak`"):
        aggregator.leak = [0.0, 0.0, 0.0]
    with pytest.raises(ParameterTypeError, match="`generator`"):
        get_aggregator("graddrop", generator=1)
    assert aggregator.f is always_positive
    assert aggregator.leak is leak


def test_it_shows_itself_without_addresses() -> None:
    assert repr(get_aggregator("graddrop")) == "GradDrop(f=identity, leak=None)"


def test_fractions_let_through_are_parts_of_a_whole() -> None:
    for leak in (torch.tensor([0.5, 1.5]), torch.tensor([-0.5, 0.5])):
        with pytest.raises(
            ParameterError, match=r"`leak` must be a vector of fractions in \[0, 1\]"
        ):
            get_aggregator("graddrop", leak=leak)(torch.eye(2))
