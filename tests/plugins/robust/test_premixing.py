"""Wrappers: what they do to the rows, and that any aggregator can be wrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore import ParameterError, get_aggregator, get_weighting, to_config
from jdcore.aggregation import GramianSource, as_weighting
from jdcore.autogram import Engine
from jdcore.autojac import backward, jac_to_grad


def column(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)[:, None]


def drawn(seed: int, m: int, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def seen_by(name: str, rows: Tensor, **arguments: Any) -> Tensor:
    """The rows that a wrapped aggregator is given."""
    seen: list[Tensor] = []

    def look(matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return matrix.sum(0)

    get_aggregator(name, aggregator=look, **arguments)(rows)
    return seen[0]


def test_each_row_becomes_the_mean_of_those_closest_to_it() -> None:
    mixed = seen_by("nnm", column(0, 1, 9), n_byzantine=1)

    assert mixed.flatten().tolist() == [0.5, 0.5, 5.0]


def test_the_rows_closest_to_one_are_those_of_its_distances() -> None:
    rows = drawn(0, 7)
    nearest = torch.cdist(rows, rows).argsort(dim=1)[:, :5]

    torch.testing.assert_close(seen_by("nnm", rows, n_byzantine=2), rows[nearest].mean(1))


def test_buckets_hold_every_row_once() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = seen_by("bucketing", torch.eye(7), bucket_size=3, generator=generator)

    sizes = (mixed > 0).sum(1).tolist()
    assert sizes == [3, 3, 1]
    assert (mixed > 0).sum(0).tolist() == [1] * 7
    assert mixed.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_buckets_of_one_are_the_rows_in_another_order() -> None:
    rows = drawn(1, 5)
    mixed = seen_by("bucketing", rows, bucket_size=1)

    assert mixed[mixed[:, 0].argsort()].tolist() == rows[rows[:, 0].argsort()].tolist()


def test_buckets_of_a_mean_cost_no_gramian() -> None:
    def refuse() -> Tensor:
        raise AssertionError("the Gramian was computed")

    wrapper = get_aggregator("bucketing", aggregator=lambda matrix: matrix.mean(0))
    source = GramianSource(4, torch.float64, torch.device("cpu"), refuse)

    assert wrapper.mix(source).shape == (2, 4)


def test_rows_longer_than_the_limit_are_clipped_to_it() -> None:
    rows = torch.tensor([[30.0, 40.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[6.0, 8.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])

    torch.testing.assert_close(seen_by("clipping", rows, max_norm=10.0), expected)
    assert not seen_by("clipping", rows, max_norm=0.0).any()


@pytest.mark.parametrize(
    ("f", "lengths"),
    [
        (0, [1.0, 2.0, 3.0, 4.0, 5.0]),
        (1, [1.0, 2.0, 3.0, 4.0, 4.0]),  # 2 (1 / 5) 4 = 1.6: one row
        (2, [1.0, 2.0, 3.0, 3.0, 3.0]),  # 2 (2 / 5) 3 = 2.4: two rows
    ],
)
def test_the_longest_rows_are_clipped_to_the_next_one(f: int, lengths: list[float]) -> None:
    rows = torch.diag(torch.arange(1.0, 6.0))

    assert seen_by("arc", rows, n_byzantine=f).norm(dim=1).tolist() == pytest.approx(lengths)


WRAPPERS: dict[str, dict[str, Any]] = {
    "nnm": {"n_byzantine": 1},
    "bucketing": {"bucket_size": 2},
    "clipping": {"max_norm": 2.0},
    "arc": {"n_byzantine": 1},
}
INNER = ("geometric_median", "coordinate_wise_median", "caf", "centered_clipping")


def inner(name: str) -> Any:
    return get_aggregator(name, **jdcore.describe(name).example(4))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", INNER)
def test_the_update_is_that_of_the_wrapped_method_for_the_mixed_rows(
    wrapper: str, name: str
) -> None:
    rows = drawn(3, 6)
    seeded = {"generator": torch.Generator().manual_seed(0)} if wrapper == "bucketing" else {}
    mixed = seen_by(wrapper, rows, **WRAPPERS[wrapper], **seeded)
    if seeded:
        seeded["generator"].manual_seed(0)
    whole = get_aggregator(wrapper, aggregator=inner(name), **WRAPPERS[wrapper], **seeded)

    torch.testing.assert_close(whole(rows), inner(name)(mixed))


@pytest.mark.parametrize("wrapper", ["nnm", "clipping", "arc"])
def test_around_a_weighting_they_work_with_autogram_as_with_autojac(wrapper: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1).double()
    inputs = torch.randn(6, 5, dtype=torch.float64)
    whole = get_aggregator(wrapper, aggregator=inner("geometric_median"), **WRAPPERS[wrapper])

    Engine(model, batch_dim=0).backward(model(inputs).squeeze(1).square(), whole)
    grams = [p.grad for p in model.parameters()]
    model.zero_grad()
    backward(model(inputs).squeeze(1).square())
    jac_to_grad(model.parameters(), whole)

    for gram, parameter in zip(grams, model.parameters(), strict=True):
        torch.testing.assert_close(gram, parameter.grad)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nested_configurations_make_the_round_trip(wrapper: str) -> None:
    config = {
        "name": wrapper,
        "aggregator": {
            "name": "arc",
            "aggregator": {"name": "mda", "n_byzantine": 1},
            "n_byzantine": 1,
        },
        **{key: value for key, value in WRAPPERS[wrapper].items() if key != "bucket_size"},
    }
    built = get_aggregator(config)

    assert as_weighting(built)(torch.eye(7)).shape == (7,)
    assert to_config(built, omit=["generator"] if wrapper == "bucketing" else []) | {
        "max_norm": 2.0
    } == config | {"max_norm": 2.0}


def test_a_configuration_names_the_path_of_what_is_wrong_inside() -> None:
    inner = {"name": "mda", "n_byzantine": -1}

    with pytest.raises(ParameterError, match=r"`config.aggregator.n_byzantine` must be >= 0"):
        get_aggregator({"name": "nnm", "aggregator": inner, "n_byzantine": 1})


def test_as_weightings_they_are_asked_through_their_aggregator() -> None:
    with pytest.raises(ParameterError, match="get_aggregator"):
        get_weighting("nnm", aggregator=inner("geometric_median"), n_byzantine=1)


@pytest.mark.parametrize("wrapper", ["nnm", "arc"])
def test_too_few_rows_are_refused(wrapper: str) -> None:
    whole = get_aggregator(wrapper, aggregator=inner("geometric_median"), n_byzantine=3)

    with pytest.raises(ParameterError, match=r"at least 7 rows \(2 n_byzantine \+ 1\), got 6"):
        whole(drawn(0, 6))
