from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError
from jdcore.aggregation import GramianAggregator, GramianSource, WeightingWrapper, state_field
from jdcore.autojac import backward, gramian_backward, jac_to_grad


@define(eq=False)
class _Counted(WeightingWrapper):
    """Looks at no row."""

    calls: int = state_field(int)

    def rewrite(self, source: GramianSource) -> Tensor:
        self.calls += 1
        return torch.ones(source.rows, dtype=torch.float64)


def _by_norm(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt() / len(gramian)


def _reference(
    losses: list[Tensor] | Tensor, parameters: list[Tensor]
) -> tuple[Tensor | None, list[Tensor]]:
    backward(losses, inputs=parameters, retain_graph=True, parallel_chunk_size=1)
    weights = jac_to_grad(parameters, GramianAggregator(_by_norm))
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return weights, gradients


def _check(losses: list[Tensor] | Tensor, parameters: list[Tensor], **keywords: Any) -> None:
    weights, gradients = _reference(losses, parameters)
    got = gramian_backward(losses, _by_norm, **keywords)
    torch.testing.assert_close(got, weights)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert not hasattr(parameter, "jac")


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()).double()


def test_the_update_is_that_of_backward_and_jac_to_grad() -> None:
    model = _mlp()
    losses = model(torch.randn(6, 4, dtype=torch.float64)).square().mean(dim=0)
    _check(losses, list(model.parameters()))


def test_separate_losses_with_heads_of_their_own() -> None:
    model, heads = _mlp(), [nn.Linear(3, 1).double() for _ in range(3)]
    features = model(torch.randn(6, 4, dtype=torch.float64))
    losses = [head(features).square().mean() for head in heads]
    _check(losses, [*model.parameters(), *(p for head in heads for p in head.parameters())])


def test_a_tied_weight_and_a_branching_graph() -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, dtype=torch.float64)
    hidden = torch.tanh(w @ x)
    _check([(w.T @ hidden).sum(), hidden.prod(), w.diagonal().square().sum()], [w])


def test_graphs_that_vmap_cannot_batch() -> None:
    model = _mlp()
    hidden = torch.utils.checkpoint.checkpoint(
        model, torch.randn(6, 4, dtype=torch.float64), use_reentrant=False
    )
    _check(hidden.mean(dim=0), list(model.parameters()))


def test_only_the_inputs_asked_for_get_a_gradient() -> None:
    model = _mlp()
    losses = model(torch.randn(6, 4, dtype=torch.float64)).square().mean(dim=0)
    last = list(model[2].parameters())
    _check(losses, last, inputs=last)
    assert model[0].weight.grad is None


def test_non_leaf_inputs_leave_the_leaves_behind_them_alone() -> None:
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    hidden = a.sin()
    hidden.retain_grad()
    losses = hidden.cumprod(0)
    gramian_backward(losses, _by_norm, inputs=[hidden])
    assert a.grad is None
    jacobian = torch.stack(
        [
            torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
            torch.stack([hidden[1], hidden[0], hidden[0] * 0]).detach(),
            torch.stack(
                [hidden[1] * hidden[2], hidden[0] * hidden[2], hidden[0] * hidden[1]]
            ).detach(),
        ]
    )
    torch.testing.assert_close(hidden.grad, _by_norm(jacobian @ jacobian.T) @ jacobian)


def test_an_absent_loss_has_no_effect() -> None:
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.ones(2, dtype=torch.float64)

    gramian_backward([torch.zeros(()), a.square().sum()], weighting)
    assert seen[0][0].eq(0).all()
    torch.testing.assert_close(a.grad, 2 * a.detach())


def test_an_aggregator_of_a_weighting_is_accepted_and_gradients_accumulate() -> None:
    a = torch.ones(2, requires_grad=True)
    for _ in range(2):
        gramian_backward([a.sum(), 2 * a.sum()], GramianAggregator(lambda g: torch.ones(2)))
    assert a.grad.tolist() == [6.0, 6.0]


def test_the_graph_is_freed_unless_retained() -> None:
    a = torch.ones(2, requires_grad=True)
    losses = a.exp()
    gramian_backward(losses, _by_norm, retain_graph=True)
    gramian_backward(losses, _by_norm)
    with pytest.raises(RuntimeError, match="second time"):
        gramian_backward(losses, _by_norm)


class _Matrix:
    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix.sum(dim=0)

    def aggregate_blocks(self, blocks: list[Tensor]) -> tuple[list[Tensor], None]:
        return [block.sum(dim=0) for block in blocks], None


def test_bad_input_changes_nothing() -> None:
    a = torch.ones(2, requires_grad=True)
    a.grad = torch.full((2,), 9.0)
    losses = a.exp()

    def fail(gramian: Tensor) -> Tensor:
        raise ZeroDivisionError

    for weighting, error, match in (
        ("upgrad", ParameterTypeError, "a Weighting or the aggregator of one"),
        (_Matrix(), ParameterTypeError, "backward, then jac_to_grad"),
        (lambda gramian: torch.ones(3), ParameterError, r"weights of shape \[2\]"),
        (lambda gramian: None, ParameterError, r"weights of shape \[2\]"),
        (fail, ZeroDivisionError, "^$"),
    ):
        with pytest.raises(error, match=match):
            gramian_backward(losses, weighting, retain_graph=True)
    assert a.grad.tolist() == [9.0, 9.0]
    gramian_backward(losses, _by_norm)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_of_nan_is_none_for_a_method_that_looks_at_no_row(sparse: bool) -> None:
    table, weighting = nn.Embedding(3, 2, sparse=sparse), _Counted(_by_norm)
    for factor, calls in ((1.0, 1), (math.nan, 1), (1.0, 2)):
        losses = factor * table(torch.tensor([0, 2])).sum(1)
        gramian_backward(losses, weighting)
        assert weighting.calls == calls
        table.zero_grad()
