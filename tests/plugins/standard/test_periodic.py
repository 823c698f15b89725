from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import NonFiniteError, ParameterError, get_aggregator, get_weighting
from jdcore.aggregation import GramianSource, weigh


def diagonal(gramian: Tensor) -> Tensor:
    return gramian.diagonal()


def scaled(scale: float) -> Tensor:
    return torch.eye(2, dtype=torch.float64) * scale


def test_weights_are_those_of_the_last_call_that_computed_them() -> None:
    weighting = get_weighting("periodic", weighting=diagonal, every=3)

    found = [float(weighting(scaled(k))[0]) for k in range(1, 8)]

    assert found == [1, 1, 1, 4, 4, 4, 7]


def test_calls_in_between_ask_for_no_gramian() -> None:
    weighting = get_weighting("periodic", weighting=get_weighting("upgrad"), every=2)
    asked = []
    for _ in range(4):
        source = GramianSource.of(scaled(1.0))
        weigh(weighting, source)
        asked.append(source.asked)

    assert asked == [True, False, True, False]


def test_a_saved_state_continues_in_between() -> None:
    one, two = (get_weighting("periodic", weighting=diagonal, every=3) for _ in range(2))
    one(scaled(5.0))
    two.load_state_dict(one.state_dict())

    assert [float(two(scaled(7.0))[0]) for _ in range(3)] == [5.0, 5.0, 7.0]


def test_input_that_is_not_finite_counts_for_nothing() -> None:
    aggregator = get_aggregator("periodic", weighting=diagonal, every=2)
    broken = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])

    assert aggregator(broken).isnan().all()
    aggregator(torch.eye(2))
    assert aggregator(broken).isnan().all()
    assert aggregator.state_dict()["calls"] == 1
    assert aggregator(2 * torch.eye(2)).tolist() == [2.0, 2.0]
    assert aggregator(2 * torch.eye(2)).tolist() == [8.0, 8.0]


def test_a_gramian_that_is_not_finite_counts_for_nothing_in_between() -> None:
    weighting = get_weighting("periodic", weighting=diagonal, every=2)
    weighting(torch.eye(2))
    broken = torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]])

    assert weighting(broken).isnan().all()
    weighting.check_finite = True  # type: ignore[attr-defined]  # of all that are built on it
    with pytest.raises(NonFiniteError, match="0"):
        weighting(broken)
    assert weighting.state_dict()["calls"] == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_reused_weights_are_those_of_the_rows_they_were_made_for(scale: float) -> None:
    aggregator = get_aggregator(
        "periodic", weighting=get_weighting("nash_mtl", max_norm=0.0), every=2
    )
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    _, first = aggregator.aggregate_blocks([matrix * scale])
    _, second = aggregator.aggregate_blocks([matrix])

    torch.testing.assert_close(second, first)


def test_another_number_of_objectives_in_between_is_refused() -> None:
    weighting = get_weighting("periodic", weighting=diagonal, every=2)
    weighting(torch.eye(2))

    with pytest.raises(ParameterError, match=r"of 2 objectives.*one of 3"):
        weighting(torch.eye(3))


def test_losses_reach_the_wrapped_method() -> None:
    aggregator = get_aggregator("periodic", weighting=get_weighting("gradnorm"), every=2)

    assert aggregator(torch.eye(2), losses=torch.ones(2)).tolist() == [1.0, 1.0]
    aggregator.reset()
    with pytest.raises(ParameterError, match="`losses` must be given"):
        aggregator(torch.eye(2))


def test_a_second_batch_reaches_the_wrapped_method() -> None:
    aggregator = get_aggregator("periodic", weighting=get_weighting("modo"), every=2)

    vector = aggregator(torch.eye(2), second=torch.eye(2))
    assert vector.tolist() == [0.5, 0.5]
    assert get_weighting("periodic", weighting=get_weighting("modo"))(torch.eye(2)).tolist() == [
        0.5,
        0.5,
    ]


@pytest.mark.parametrize("name", ["periodic", "cr_mogm"])
def test_weights_of_rows_at_the_end_of_float32_are_not_those_of_later_rows(name: str) -> None:
    arguments = {"every": 2} if name == "periodic" else {"alpha": 0.9}
    aggregator = get_aggregator(name, weighting=get_weighting("nash_mtl"), **arguments)
    rows = torch.eye(2)

    first = aggregator(1e-45 * rows)
    second = aggregator(rows)

    torch.testing.assert_close(first, torch.full((2,), 0.5**0.5))
    torch.testing.assert_close(second, first)
