from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdcore import ParameterError, TransformError
from jdcore.autojac.transform import (
    AccumulateGrad,
    AccumulateJac,
    Diagonalize,
    Init,
    Jac,
    Keep,
    PerTask,
    Transform,
)


def _leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


class Scale(Transform):
    """What a user might write: multiply every row by a factor."""

    def __init__(self, keys: list[Tensor], factor: float) -> None:
        super().__init__(needs=keys, gives=keys)
        self.factor = factor

    def apply(self, values: dict[Tensor, Tensor], /) -> dict[Tensor, Tensor]:
        return {key: value * self.factor for key, value in values.items()}


def test_a_transform_of_the_user_composes_with_ours() -> None:
    w = _leaf(2)
    losses = w * 3
    graph = Init([losses]) >> Diagonalize([losses]) >> Jac([losses], [w]) >> Scale([w], 2.0)
    graph = graph >> AccumulateJac([w])
    graph()
    assert w.jac.tolist() == [[6.0, 0.0], [0.0, 6.0]]


def test_missing_keys_are_named_when_the_graph_is_built() -> None:
    a, b = _leaf(2), _leaf(3, 4)
    losses = a * 2
    with pytest.raises(
        TransformError, match=r"AccumulateJac.* lacks? .*|needs keys .* float32\[3, 4\]"
    ):
        Init([losses]) >> Diagonalize([losses]) >> Jac([losses], [a]) >> AccumulateJac([a, b])
    with pytest.raises(TransformError, match=r"float32\[2\] of Mul"):
        Init([b]) >> Jac([losses], [a])


def test_missing_keys_are_named_when_a_graph_without_source_is_run() -> None:
    a = _leaf(2)
    with pytest.raises(TransformError, match=r"given to it lack float32\[2\]"):
        Scale([a], 2.0)({})
    with pytest.raises(TransformError, match="lack"):
        Scale([a], 2.0)()


def test_doubled_keys_are_named_when_the_graph_is_built() -> None:
    a = _leaf(5)
    with pytest.raises(TransformError, match=r"both give float32\[5\]"):
        Keep([a]) | Scale([a], 2.0)


def test_keys_that_are_not_needed_are_dropped() -> None:
    a, b = _leaf(2), _leaf(2)
    assert list((Init([a, b]) >> Keep([b]))()) == [b]


def test_a_union_reads_the_same_values_and_unites_the_results() -> None:
    a, b = _leaf(2), _leaf(2)
    result = (Init([a, b]) >> (Scale([a], 2.0) | Scale([b], 3.0)))()
    assert result[a].tolist() == [2.0, 2.0]
    assert result[b].tolist() == [3.0, 3.0]


def test_composition_is_associative() -> None:
    a = _leaf(2)
    first, second, third = (Scale([a], factor) for factor in (2.0, 3.0, 5.0))
    left = (first >> second) >> third
    right = first >> (second >> third)
    assert repr(left) == repr(right)
    assert left({a: a.detach()})[a].tolist() == right({a: a.detach()})[a].tolist() == [30.0, 30.0]


def test_init_checks_the_number_of_its_values() -> None:
    with pytest.raises(ParameterError, match="1 tensors, one each"):
        Init([_leaf(2)], [])


def test_per_task_gives_rows_for_some_keys_and_sums_of_the_tasks_that_ask_for_the_others() -> None:
    shared, private, unused = _leaf(2), _leaf(), _leaf(3)
    losses = [(shared * factor).sum() * private for factor in (1.0, 2.0, 4.0)]
    losses.append(torch.tensor(1.0))
    tasks = [[private], [private, unused], [], []]
    result = (Init(losses) >> PerTask(losses, [shared], tasks))()
    assert result[shared].tolist() == [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [0.0, 0.0]]
    assert result[private].item() == 6.0
    assert result[unused].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("retain_graph", [False, True])
def test_per_task_frees_the_graph_of_a_task_that_no_later_one_needs(retain_graph: bool) -> None:
    weight = _leaf(2)
    losses = [weight.exp().sum() for _ in range(3)]
    task = PerTask(
        losses, [weight], [[]] * 3, retained=[False, True, False], retain_graph=retain_graph
    )
    (Init(losses) >> task)()
    for loss, retained in zip(losses, [retain_graph, True, retain_graph], strict=True):
        if retained:
            torch.autograd.grad(loss, weight)
        else:
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(loss, weight)


def test_accumulators_write_nothing_if_one_value_does_not_fit() -> None:
    a, b = _leaf(2), _leaf(2)
    b.jac = torch.zeros(5, 2)
    with pytest.raises(ParameterError, match=r"`\.jac`"):
        AccumulateJac([a, b])({a: torch.zeros(1, 2), b: torch.zeros(1, 2)})
    assert not hasattr(a, "jac")
    b.grad = torch.zeros(2).to_sparse()
    with pytest.raises(ParameterError, match=r"`\.grad`"):
        AccumulateGrad([a, b])({a: torch.zeros(2), b: torch.zeros(2)})
    assert a.grad is None


def test_a_graph_prints_itself() -> None:
    trunk = [_leaf(2) for _ in range(5)]
    head = _leaf()
    features = sum(trunk)
    loss = features.sum() * head
    graph = (
        PerTask([loss], [features], [[head]])
        >> (Jac([features], trunk) | Keep([head]))
        >> (AccumulateJac(trunk) | AccumulateGrad([head]))
    )
    assert repr(graph) == (
        "PerTask(float32[] of Mul -> rows of float32[2] of Add; sums of float32[])\n"
        ">> (Jac(float32[2] of Add -> float32[2], float32[2], 3 more) | Keep(float32[]))\n"
        ">> (AccumulateJac(float32[2], float32[2], 3 more) | AccumulateGrad(float32[]))"
    )
