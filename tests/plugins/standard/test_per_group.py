from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from jdcore import ParameterError, ParameterTypeError, get_aggregator, get_weighting
from jdcore.autojac import backward, jac_to_grad


def draw(seed: int, n: int = 10) -> torch.Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(seed)).double()


def test_each_group_is_aggregated_alone() -> None:
    matrix = draw(0)
    expected = [get_aggregator("mgda")(part) for part in matrix.split([4, 1, 5], dim=1)]

    vector = get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=[4, 1, 5])(
        matrix
    )
    with_rest = get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=[4, 1])(
        matrix
    )

    assert torch.equal(vector, torch.cat(expected))
    assert torch.equal(with_rest, vector)


def test_groups_may_cut_and_join_blocks() -> None:
    matrix = draw(0)
    aggregator = get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=[4, 1])
    blocks = [matrix[:, :2], matrix[:, 2:2], matrix[:, 2:7].float(), matrix[:, 7:]]

    vectors, weights = aggregator.aggregate_blocks(blocks)

    assert weights is None
    assert [v.dtype for v in vectors] == [b.dtype for b in blocks]
    torch.testing.assert_close(torch.cat(vectors), aggregator(matrix), rtol=1e-5, atol=1e-6)


def test_layers_of_a_model_get_the_updates_of_one_call_each() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    losses = model(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).square().mean(0)
    backward(losses, retain_graph=True)
    for layer in (model[0], model[2]):
        jac_to_grad(layer.parameters(), get_aggregator("upgrad"))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (model[0], model[2])]

    backward(losses)
    jac_to_grad(
        model.parameters(),
        get_aggregator("per_group", aggregator=get_aggregator("upgrad"), columns=sizes),
    )

    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_each_group_has_a_state_of_its_own() -> None:
    def moving() -> object:
        return get_aggregator("cr_mogm", weighting=get_weighting("mgda"), alpha=0.5)

    apart = [moving(), moving()]
    together = get_aggregator("per_group", aggregator=moving(), columns=[4])
    for seed in range(3):
        pieces = draw(seed).split([4, 6], dim=1)
        expected = [one(piece) for one, piece in zip(apart, pieces, strict=True)]  # type: ignore[operator]
        assert torch.equal(together(draw(seed)), torch.cat(expected))
    file = io.BytesIO()
    torch.save(together.state_dict(), file)
    file.seek(0)
    restored = get_aggregator("per_group", aggregator=moving(), columns=[4])
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(draw(9)), together(draw(9)))


def test_a_call_that_fails_in_a_later_group_changes_no_state() -> None:
    calls: list[int] = []

    def failing(gramian: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return gramian.diagonal()

    aggregator = get_aggregator(
        "per_group", aggregator=get_aggregator("cr_mogm", weighting=failing), columns=[4]
    )
    aggregator(draw(0))
    before = repr(aggregator.state_dict())

    with pytest.raises(RuntimeError, match="out of luck"):
        aggregator(draw(1))
    assert repr(aggregator.state_dict()) == before


def test_groups_that_cannot_be_put_together_change_no_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    inner = get_aggregator("cr_mogm", weighting=get_weighting("mgda"))
    aggregator = get_aggregator("per_group", aggregator=inner, columns=[4])
    aggregator(draw(0))
    before = repr(aggregator.state_dict())

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", fail)
        with pytest.raises(MemoryError):
            aggregator(draw(1))
    assert repr(aggregator.state_dict()) == before


def test_more_columns_than_there_are_is_refused() -> None:
    aggregator = get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=[4, 7])

    with pytest.raises(ParameterError, match=r"`columns` must be of a sum up to 10.*got 11"):
        aggregator(draw(0))


@pytest.mark.parametrize("columns", [np.array(4), torch.tensor(4), "4", 4])
def test_columns_that_are_no_numbers_are_refused(columns: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`columns` must be numbers of columns, got"):
        get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=columns)


@pytest.mark.parametrize("matrix", [draw(0, 4), torch.zeros(3, 4).double(), draw(1)[:1]])
def test_degenerate_matrices_of_enough_columns_are_served(matrix: torch.Tensor) -> None:
    aggregator = get_aggregator("per_group", aggregator=get_aggregator("upgrad"), columns=[3, 1])
    duplicate = torch.cat([matrix, matrix, -matrix])

    for example in (matrix, duplicate):
        assert aggregator(example).isfinite().all()


@pytest.mark.parametrize("columns", [[0], [2, -1], [1.5], 3, "12"])
def test_unusable_groups_are_refused(columns: object) -> None:
    with pytest.raises((ParameterError, ParameterTypeError), match="`columns` must be"):
        get_aggregator("per_group", aggregator=get_aggregator("mgda"), columns=columns)


def test_losses_reach_the_wrapped_method() -> None:
    aggregator = get_aggregator(
        "per_group", aggregator=get_aggregator("db_mtl", beta=0.0), columns=[1]
    )

    vector = aggregator(torch.eye(2), losses=torch.ones(2))
    assert vector.tolist() == [1.0, 1.0]
    with pytest.raises(ParameterError, match="`losses` must be given"):
        aggregator(torch.eye(2))


@pytest.mark.parametrize("columns", [2, torch.tensor(2), torch.tensor([2, 3]), "23"])
def test_what_is_no_sequence_of_ints_is_refused(columns: object) -> None:
    with pytest.raises(ParameterTypeError, match="`columns` must be numbers of columns"):
        get_aggregator("per_group", aggregator=get_aggregator("mean"), columns=columns)


@pytest.mark.parametrize("method", ["modo", "sdmgrad"])
def test_groups_are_given_the_second_batch(method: str) -> None:
    first, second = draw(0), draw(1)
    wrapped = get_aggregator("per_group", aggregator=get_aggregator(method), columns=[4])
    alone = [get_aggregator(method) for _ in range(2)]

    for _ in range(3):  # with a state for each group
        vector = wrapped(first, second=second)
        parts = zip(alone, first.split([4, 6], dim=1), second.split([4, 6], dim=1), strict=True)
        expected = [aggregator(one, second=two) for aggregator, one, two in parts]
        torch.testing.assert_close(vector, torch.cat(expected))

    blocks = wrapped.aggregate_blocks(
        [first[:, :6], first[:, 6:]], second=[second[:, :6], second[:, 6:]]
    )
    parts = zip(alone, first.split([4, 6], dim=1), second.split([4, 6], dim=1), strict=True)
    expected = [aggregator(one, second=two) for aggregator, one, two in parts]
    torch.testing.assert_close(torch.cat(blocks[0]), torch.cat(expected))


def test_a_second_batch_that_is_not_finite_leaves_the_state_of_all_groups() -> None:
    wrapped = get_aggregator("per_group", aggregator=get_aggregator("modo"), columns=[4])
    second = draw(1)
    second[0, -1] = float("nan")

    assert wrapped(draw(0), second=second).isnan().all()
    assert wrapped.state_dict() == {}


@pytest.mark.parametrize("wrapper", ["row_normalized", "present_tasks", "nnm", "bucketing"])
def test_wrappers_of_rows_give_the_second_batch_on(wrapper: str) -> None:
    more = {"nnm": {"n_byzantine": 0}}.get(wrapper, {})
    aggregator = get_aggregator(wrapper, aggregator=get_aggregator("modo"), **more)
    assert aggregator(draw(0), second=draw(1)).isfinite().all()
