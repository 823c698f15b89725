from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, Stateful, get_aggregator, get_weighting
from jdcore.testing import family


def sequential(matrix: Tensor, phi: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """The method row by row, as in the paper; updates the targets ``phi`` in place."""
    m = len(matrix)
    total = torch.zeros_like(matrix[0])
    for i in range(m):
        row = matrix[i].clone()
        others = [j for j in range(m) if j != i]
        for k in torch.randperm(m - 1, generator=generator).tolist():
            j = others[k]
            norm, norm_j = float(row.norm()), float(matrix[j].norm())
            found, target = float(row @ matrix[j]) / (norm * norm_j), float(phi[i, j])
            if found < target:
                sine, target_sine = math.sqrt(1 - found**2), math.sqrt(1 - target**2)
                factor = norm * (target * sine - found * target_sine) / (norm_j * target_sine)
                row = row + factor * matrix[j]
            phi[i, j] = (1 - beta) * target + beta * found
        total += row
    return total


def test_the_first_update_of_two_rows_is_that_of_pcgrad() -> None:
    matrix = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)

    weights = get_weighting("gradvac")(matrix @ matrix.T)

    torch.testing.assert_close(
        weights, torch.tensor([1 + 22 / 18, 1 + 22 / 38], dtype=torch.float64)
    )


def test_orthogonal_rows_are_brought_to_their_targets() -> None:
    # Row e1 reaches the cosine 0.6 with e2 as (1, 0.75); row e2 reaches 0.8 with e1 as (4/3, 1).
    aggregator = get_aggregator("gradvac", beta=0.5)
    aggregator.load_state_dict({"phi": torch.tensor([[0.0, 0.6], [0.8, 0.0]], dtype=torch.float64)})

    vector = aggregator(torch.eye(2, dtype=torch.float64))

    torch.testing.assert_close(
        vector, torch.tensor([7 / 3, 1.75], dtype=torch.float64), rtol=1e-14, atol=0.0
    )
    torch.testing.assert_close(
        aggregator.weighting.phi,
        torch.tensor([[0.0, 0.3], [0.4, 0.0]], dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


@pytest.mark.parametrize("name", ["gauss", "conflict", "badscale"])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_the_vectorised_steps_are_those_of_the_sequential_loop_over_several_calls(
    name: str, m: int
) -> None:
    phi = torch.zeros(m, m).double()
    ours, theirs = (torch.Generator().manual_seed(m) for _ in range(2))
    aggregator = get_aggregator("gradvac", beta=0.3, generator=ours)
    for seed in range(6):
        matrix = family(name, m, 40, generator=torch.Generator().manual_seed(seed))
        expected = sequential(matrix, phi, 0.3, theirs)
        scale = float(matrix.abs().max())

        torch.testing.assert_close(
            aggregator(matrix) / scale, expected / scale, rtol=1e-9, atol=1e-10
        )
        torch.testing.assert_close(aggregator.weighting.phi, phi, rtol=1e-9, atol=1e-10)


def test_another_number_of_rows_is_refused_until_reset() -> None:
    aggregator = get_aggregator("gradvac")
    aggregator(torch.randn(3, 5))
    before = aggregator.state_dict()["phi"]

    with pytest.raises(ParameterError, match=r"of 3 objectives.*got one of 2\. Call reset\(\)"):
        aggregator(torch.randn(2, 5))

    assert torch.equal(aggregator.state_dict()["phi"], before)
    aggregator.reset()
    assert aggregator(torch.randn(2, 5)).shape == (5,)


def test_a_refused_call_draws_no_random_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    aggregator = get_aggregator("gradvac", generator=generator)
    aggregator(torch.randn(3, 5))
    before = generator.get_state()

    with pytest.raises(ParameterError):
        aggregator(torch.randn(2, 5))
    aggregator(torch.full((3, 5), float("nan")))

    assert torch.equal(generator.get_state(), before)


def test_the_saved_state_is_a_copy() -> None:
    aggregator = get_aggregator("gradvac")
    assert isinstance(aggregator, Stateful)
    aggregator(torch.randn(3, 5))
    saved = aggregator.state_dict()
    kept = saved["phi"].clone()

    aggregator(torch.randn(3, 5))
    assert torch.equal(saved["phi"], kept)
    aggregator.load_state_dict(saved)
    saved["phi"].zero_()
    assert torch.equal(aggregator.weighting.phi, kept)


def test_a_state_of_the_wrong_shape_is_refused() -> None:
    aggregator = get_aggregator("gradvac")

    with pytest.raises(ParameterError, match="`phi` must be a square matrix"):
        aggregator.load_state_dict({"phi": torch.zeros(2, 3)})

    assert aggregator.state_dict()["phi"].shape == (0, 0)


def test_zero_rows_have_cosine_zero_and_are_left_alone() -> None:
    matrix = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0]])
    aggregator = get_aggregator("gradvac")

    for _ in range(3):
        assert bool(torch.isfinite(aggregator(matrix)).all())
    assert bool((aggregator.weighting.phi[0] == 0).all())
    assert bool((aggregator.weighting.phi[:, 0] == 0).all())


def test_rows_that_were_always_parallel_give_a_finite_update_when_they_part() -> None:
    aggregator = get_aggregator("gradvac", beta=1.0)
    aggregator(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))

    vector = aggregator(torch.tensor([[1.0, 1.0], [1.0, 0.9]], dtype=torch.float64))

    assert bool(torch.isfinite(vector).all())


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan")])
def test_a_beta_outside_the_unit_interval_is_refused(beta: float) -> None:
    weighting = get_weighting("gradvac", beta=0.25)

    with pytest.raises(ParameterError, match=r"`beta` must be in \[0.0, 1.0\]"):
        get_weighting("gradvac", beta=beta)
    with pytest.raises(ParameterError, match="`beta`"):
        weighting.beta = beta
    assert weighting.beta == 0.25


def test_targets_that_are_no_cosines_are_refused() -> None:
    weighting = get_weighting("gradvac")

    with pytest.raises(ParameterError, match="`phi` must be a matrix of cosines, got 2 in it"):
        weighting.load_state_dict({"phi": 2.0 * torch.eye(3)})  # type: ignore[attr-defined]
