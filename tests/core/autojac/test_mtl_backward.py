from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError
from jdcore._fields import get_jac
from jdcore.autojac import _mtl_plan, backward, jac, mtl_backward
from tests.core.autojac.conftest import Truth
from tests.functions import RedoneOnTheParameter


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _assert_grads(loss: Tensor, parameters: list[Tensor]) -> None:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("explicit", [False, True])
def test_trunk_gets_rows_and_heads_get_gradients(
    truth: Truth, chunk_size: int | None, explicit: bool
) -> None:
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    heads = [nn.Linear(5, 1).double() for _ in range(3)]
    features = trunk(torch.randn(6, 4, dtype=torch.float64))
    losses = [head(features).square().mean() for head in heads]
    expected = truth(losses, list(trunk.parameters()))
    parameters = (
        {
            "shared_params": trunk.parameters(),
            "tasks_params": [head.parameters() for head in heads],
        }
        if explicit
        else {}
    )

    mtl_backward(losses, features, parallel_chunk_size=chunk_size, retain_graph=True, **parameters)

    for parameter, jacobian in zip(trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.jac, jacobian, rtol=1e-12, atol=1e-14)
        assert parameter.grad is None
    for head, loss in zip(heads, losses, strict=True):
        _assert_grads(loss, list(head.parameters()))
        assert not hasattr(head.weight, "jac")


def test_several_features(truth: Truth) -> None:
    a, b, h = _leaf(3), _leaf(2), _leaf()
    features = [a.sin(), (a[:2] * b).exp()]
    losses = [features[0].sum() * h, (features[1] * features[0][:2]).sum(), features[1].prod()]
    expected = truth(losses, [a, b])
    mtl_backward(losses, features, retain_graph=True)
    torch.testing.assert_close(a.jac, expected[0])
    torch.testing.assert_close(b.jac, expected[1])
    _assert_grads(losses[0], [h])


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_layer_shared_by_some_heads_gets_the_sum_of_their_gradients(
    truth: Truth, retain_graph: bool
) -> None:
    trunk, between = _leaf(3), _leaf(3)
    features = trunk.tanh()
    middle = (features * between).sin()  # one graph, used by the first and the third head
    losses = [middle.sum(), features.square().sum(), middle.exp().sum()]
    expected = truth(losses, [trunk])
    gradient = torch.autograd.grad(losses[0] + losses[2], between, retain_graph=True)[0]

    mtl_backward(losses, features, retain_graph=retain_graph)

    torch.testing.assert_close(trunk.jac, expected[0])
    torch.testing.assert_close(between.grad, gradient)
    if retain_graph:
        mtl_backward(losses, features)
        torch.testing.assert_close(trunk.jac, 2 * expected[0])


def test_a_weight_tied_between_trunk_and_head_gets_the_whole_derivative(truth: Truth) -> None:
    tied, private = _leaf(3, 3), _leaf(3)
    features = torch.tanh(tied @ torch.ones(3, dtype=torch.float64))
    losses = [(tied.T @ features).sum(), (features * private).sum()]
    [expected] = truth(losses, [tied])
    mtl_backward(losses, features)
    torch.testing.assert_close(tied.jac, expected)
    torch.testing.assert_close(private.grad, features.detach())


def test_a_large_weight_tied_between_trunk_and_head_gets_the_whole_derivative(truth: Truth) -> None:
    weight = (torch.randn(260, 260, dtype=torch.float64) / 16).requires_grad_()
    features = torch.nn.functional.linear(torch.randn(3, 260, dtype=torch.float64), weight).tanh()
    losses = [torch.nn.functional.linear(features, weight).sum(), features.square().sum()]
    expected = truth(losses, [weight])
    mtl_backward(losses, features)
    torch.testing.assert_close(weight.jac, expected[0])


@pytest.mark.parametrize("reads_trunk", [False, True])
def test_a_parameter_gets_the_gradients_of_the_tasks_that_name_it(reads_trunk: bool) -> None:
    trunk, head = _leaf(3), _leaf(3)
    features = trunk.sin()
    other = trunk.sum() if reads_trunk else 0.0
    losses = [(features * head).sum(), (features * head).exp().sum() + other]
    expected = torch.autograd.grad(losses[0], head, retain_graph=True)[0]
    mtl_backward(losses, features, tasks_params=[[head], []], shared_params=[trunk])
    torch.testing.assert_close(head.grad, expected)


def test_a_loss_past_the_features_counts(truth: Truth) -> None:
    weight = _leaf(3)
    features = weight.sin()
    losses = [features.sum() + weight.square().sum(), features.prod()]
    [expected] = truth(losses, [weight])
    mtl_backward(losses, features)
    torch.testing.assert_close(weight.jac, expected)


def test_absent_tasks_give_zero_rows_and_no_gradient(truth: Truth) -> None:
    trunk, head = _leaf(3), _leaf()
    features = trunk.exp()
    losses = [torch.zeros((), dtype=torch.float64), features.sum() * head]
    [expected] = truth(losses[1:], [trunk])
    absent = _leaf()
    mtl_backward(losses, features, tasks_params=[[absent], [head]])
    assert trunk.jac[0].eq(0).all()
    torch.testing.assert_close(trunk.jac[1:], expected)
    assert absent.grad is None


def test_a_loss_that_does_not_depend_on_the_features_gives_a_zero_row(truth: Truth) -> None:
    trunk, head = _leaf(3), _leaf()
    features = trunk.exp()
    mtl_backward([features.sum(), head.square()], features)
    assert trunk.jac[1].eq(0).all()
    torch.testing.assert_close(head.grad, 2 * head.detach())


def test_initial_gradients_weigh_the_elements_of_each_loss(truth: Truth) -> None:
    trunk = _leaf(3)
    features = trunk.sin()
    losses = [features * 2, features.prod().view(1)]
    initial = [torch.randn(3, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)]
    whole = truth(losses, [trunk])[0]
    mtl_backward(losses, features, grad_tensors=initial)
    torch.testing.assert_close(trunk.jac[0], initial[0] @ whole[:3])
    torch.testing.assert_close(trunk.jac[1], 3 * whole[3])


def test_gradients_accumulate_in_place() -> None:
    trunk, head = _leaf(2), _leaf()
    for factor in (1.0, 2.0):
        features = trunk * factor
        mtl_backward([features.sum() * head, features.prod()], features)
        if factor == 1.0:
            first = head.grad
    assert head.grad is first
    torch.testing.assert_close(head.grad, 3 * trunk.detach().sum())


def test_no_shared_parameter_leaves_plain_gradients() -> None:
    trunk, heads = _leaf(2), [_leaf(), _leaf()]
    features = trunk.exp()
    losses = [features.sum() * head for head in heads]
    mtl_backward(losses, features, shared_params=[])
    assert not hasattr(trunk, "jac")
    for head in heads:
        torch.testing.assert_close(head.grad, features.detach().sum())


def test_task_parameters_may_lie_behind_the_features(truth: Truth) -> None:
    first, second, head = _leaf(3), _leaf(3), _leaf()
    features = first * second
    losses = [features.sum() * head, features.prod()]
    [expected] = truth(losses, [first])
    gradient = torch.autograd.grad(losses[1], second, retain_graph=True)[0]
    # On accelerators, this decides which rows there are.
    cut, trunk = _mtl_plan.find_trunk(features)
    plan = _mtl_plan.make_plan(losses, cut, trunk, [first], [[head], [second]])
    assert plan.uses == [[0], [0]]
    mtl_backward(losses, features, shared_params=[first], tasks_params=[[head], [second]])
    torch.testing.assert_close(first.jac, expected)
    torch.testing.assert_close(second.grad, gradient)


def test_a_hook_on_a_feature_acts_once(truth: Truth) -> None:
    trunk, heads = _leaf(3), [_leaf(), _leaf()]
    features = trunk.sin()
    features.register_hook(lambda gradient: gradient * 0.5)
    losses = [features.sum() * heads[0], features.prod() * heads[1]]
    [expected] = truth(losses, [trunk])
    torch.testing.assert_close(expected[0], 0.5 * trunk.detach().cos() * heads[0].detach())
    mtl_backward(losses, features)
    torch.testing.assert_close(trunk.jac, expected)


@pytest.mark.parametrize("m", [2, 12])
def test_the_grad_of_a_feature_that_retains_it_is_that_of_the_heads_alone(m: int) -> None:
    trunk = _leaf(3)
    features = trunk.sin()
    features.retain_grad()
    losses = [(features**k).sum() * _leaf() for k in range(1, m + 1)]
    expected = torch.autograd.grad(sum(losses), features, retain_graph=True)[0]
    features.grad = None
    mtl_backward(losses, features)
    torch.testing.assert_close(features.grad, expected)


# -- all kinds of heads ----------------------------------------------------------------------------

X = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).view(2, 4)
Heads = Callable[["list[Tensor]", "list[Tensor]"], "list[Tensor]"]

HEADS: dict[str, Heads] = {
    "each reads both features": lambda f, w: [(f[0] @ v + f[1] @ v).square().sum() for v in w],
    "a feature is read by several operations": lambda f, w: [
        (f[0] * f[0]).sum() * v[0] + f[0].exp().sum() + (f[0] @ v).sum() for v in w
    ],
    "some read no feature, or one": lambda f, w: [
        (f[0] @ w[0]).sum(),
        (f[1] @ w[1]).sum(),
        w[2].square().sum(),
    ],
    "a loss is a reduced feature": lambda f, w: [f[0].sum(), (f[1] @ w[1]).sum(), w[2].sum()],
    "a loss is an entry of a weight": lambda f, w: [w[0][0].clone(), (f[0] @ w[1]).sum()],
    "a gradient is handed on as it is": lambda f, w: [w[0][0] + f[0].sum(), w[1][0] + f[1].sum()],
    "two share a weight": lambda f, w: [(f[0] @ w[0]).sum(), (f[0] @ w[0] + f[1] @ w[1]).sum()],
    "losses of one operation": lambda f, w: list((f[0] @ torch.stack(w, 1)).square().sum(0)),
    "a loss is a feature": lambda f, w: [f[2], (f[0] @ w[0]).sum()],
    "a loss is a parameter": lambda f, w: [_leaf(), (f[0] @ w[1]).sum()],
    "a custom function": lambda f, w: [RedoneOnTheParameter.apply(f[0], v).sum() for v in w],
}


def _features() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    trunk, weights = [_leaf(4, 4), _leaf(4, 4)], [_leaf(4) for _ in range(3)]
    hidden = (X @ trunk[0]).sin()
    return trunk, weights, [hidden.exp(), (hidden @ trunk[1]).tanh(), hidden.prod(1).sum()]


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("name", [*HEADS])
def test_any_heads_give_what_a_pass_each_gives(truth: Truth, name: str, initial: bool) -> None:
    trunk, weights, features = _features()
    losses = HEADS[name](features, weights)
    factors = torch.linspace(1.0, 2.0, len(losses), dtype=torch.float64).unbind()
    starts = [factor.clone() for factor in factors] if initial else None
    scales = torch.stack(factors) if initial else torch.ones(len(losses), dtype=torch.float64)
    rows = [torch.einsum("k,k...->k...", scales, row) for row in truth(losses, [*trunk, *weights])]

    mtl_backward(losses, features, grad_tensors=starts)
    for parameter, expected in zip(trunk, rows, strict=False):
        torch.testing.assert_close(parameter.jac, expected, rtol=1e-12, atol=1e-14)
    for weight, expected in zip(weights, rows[2:], strict=True):
        if weight.grad is None:
            assert not expected.any()
        else:
            torch.testing.assert_close(weight.grad, expected.sum(0), rtol=1e-12, atol=1e-14)
            weight.grad.zero_()  # is memory of its own
    for given, factor in zip(starts or (), factors, strict=False):
        assert given.equal(factor)


@pytest.mark.parametrize("few", [0, 8])
def test_hooks_in_heads_act_on_what_they_send_to_the_trunk(
    truth: Truth, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(_mtl_plan, "_FEW_TASKS", few)
    trunk, weights, features = _features()
    hidden = [features[0] * weight for weight in weights]
    hidden[1].register_hook(lambda gradient: gradient.clamp(max=0.2))
    hidden[2].retain_grad()
    losses = [h.sum().square() for h in hidden]
    losses[0].grad_fn.register_hook(lambda inputs, _: (2.0 * inputs[0],))
    expected = truth(losses, trunk[:1])
    [retained] = torch.autograd.grad(losses[2], hidden[2], retain_graph=True)
    hidden[2].grad = None
    mtl_backward(losses, features[:1])
    torch.testing.assert_close(trunk[0].jac, expected[0])
    torch.testing.assert_close(hidden[2].grad, retained)


@pytest.mark.parametrize("few", [0, 8])
def test_passes_that_a_hook_starts_are_not_heard(
    truth: Truth, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(_mtl_plan, "_FEW_TASKS", few)
    trunk, weights, features = _features()
    losses = [(features[0] @ weight).square().sum() for weight in weights]
    others: list[Tensor] = []

    def ask(gradient: Tensor) -> Tensor:
        # Through the head of another task, down to the very feature.
        others.extend(torch.autograd.grad(losses[1], features[0], retain_graph=True))
        return gradient

    expected = truth(losses, trunk[:1])
    products = [(features[0] @ weight) for weight in weights]
    handle = products[0].register_hook(ask)
    losses = [product.square().sum() for product in products]
    mtl_backward(losses, features[:1], retain_graph=True)
    handle.remove()  # which refers to its own graph: torch would keep both for ever
    assert len(others) == 1
    torch.testing.assert_close(trunk[0].jac, expected[0])


class _Copies(torch.autograd.Function):
    """Several results of one function, as a compiled region has them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _copied(*tensors: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = _Copies.apply(*tensors)  # type: ignore[no-untyped-call]
    return results


def test_a_function_that_gives_features_and_outputs_of_heads_needs_the_parameters(
    truth: Truth,
) -> None:
    trunk, heads = nn.Linear(3, 4).double(), [nn.Linear(4, 1).double() for _ in range(3)]
    found = trunk(torch.randn(5, 3, dtype=torch.float64)).tanh()
    features, *outputs = _copied(found, *(head(found) for head in heads))
    losses = [output.square().mean() for output in outputs]
    shared, tasks = list(trunk.parameters()), [list(head.parameters()) for head in heads]
    expected = truth(losses, [*shared, *(p for task in tasks for p in task)])

    for given, name in (({}, "shared_params"), ({"shared_params": shared}, "tasks_params")):
        with pytest.raises(ParameterError, match=f"`{name}`.*_CopiesBackward"):
            mtl_backward(losses, features, **given, retain_graph=True)
    assert all(p.grad is None and get_jac(p) is None for p in (*shared, *heads[0].parameters()))
    mtl_backward(losses, features, shared_params=shared, tasks_params=tasks)

    for parameter, jacobian in zip(shared, expected, strict=False):
        torch.testing.assert_close(parameter.jac, jacobian)
    private = [parameter for task in tasks for parameter in task]
    for parameter, jacobian in zip(private, expected[len(shared) :], strict=True):
        torch.testing.assert_close(parameter.grad, jacobian.sum(0))


def test_a_function_whose_result_trunk_and_heads_use_is_shared(truth: Truth) -> None:
    raw, scale = _leaf(3, 3), _leaf()
    (weight,) = _copied(raw)
    features = (torch.randn(5, 3, dtype=torch.float64) @ weight).tanh()
    losses = [(features @ weight).mean(), (scale * features).square().sum()]
    [expected, of_scale] = truth(losses, [raw, scale])

    mtl_backward(losses, features)
    torch.testing.assert_close(raw.jac, expected)
    torch.testing.assert_close(scale.grad, of_scale.sum(0))


def test_what_is_frozen_after_the_forward_pass_gets_nothing(truth: Truth) -> None:
    """As Lightning's `toggle_optimizer` freezes what belongs to other optimizers."""
    frozen, trunk = nn.Linear(3, 3).double(), nn.Linear(3, 4).double()
    heads = [nn.Linear(4, 1).double() for _ in range(6)]
    features = trunk(frozen(torch.randn(5, 3, dtype=torch.float64)).tanh())
    losses = [head(features).square().mean() for head in heads]
    expected = truth(losses, [trunk.weight, heads[1].weight])
    frozen.requires_grad_(False)
    heads[0].requires_grad_(False)

    backward(losses, retain_graph=True)
    torch.testing.assert_close(heads[1].weight.jac, expected[1])
    del trunk.weight.jac, trunk.bias.jac
    mtl_backward(losses, features)
    torch.testing.assert_close(trunk.weight.jac, expected[0])
    torch.testing.assert_close(heads[1].weight.grad, expected[1].sum(0))
    for parameter in (*frozen.parameters(), *heads[0].parameters()):
        assert parameter.grad is None
        assert get_jac(parameter) is None


def test_a_single_row_shares_its_memory_with_no_other_gradient() -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    features = a + b
    loss = (features * features).sum()
    mtl_backward([loss], features)
    assert a.jac.data_ptr() != b.jac.data_ptr()
    a.jac.zero_()
    assert b.jac.tolist() == [[4.0] * 3]


@pytest.mark.parametrize("width", [3, 600])
def test_a_feature_that_counts_for_nothing_may_have_an_infinite_derivative(width: int) -> None:
    trunk = nn.Linear(width, width).double()
    hidden = trunk(torch.randn(2, width, dtype=torch.float64))
    features = [hidden.tanh(), (hidden - hidden.detach()).sqrt()]
    heads = [_leaf(width) for _ in range(2)]
    losses = [(features[0] * head).sum() + 0.0 * features[1].sum() for head in heads]
    expected = [
        torch.autograd.grad((features[0] * head).sum(), trunk.weight, retain_graph=True)[0]
        for head in heads
    ]
    mtl_backward(losses, features)
    torch.testing.assert_close(get_jac(trunk.weight), torch.stack(expected))


@pytest.mark.parametrize("step", ["backward", "jac", "mtl_backward"])
def test_tensors_that_retain_their_gradient_are_as_before_where_a_hook_raises(step: str) -> None:
    trunk, heads = _leaf(3), [_leaf(3) for _ in range(12)]
    features = trunk.sin()
    hidden = [features * head for head in heads]
    losses = [h.square().sum() for h in hidden]
    hidden[0].retain_grad()
    hidden[0].grad = torch.zeros_like(hidden[0])
    features.retain_grad()
    gradients: list[Tensor] = []

    def refuse(gradient: Tensor) -> None:
        gradients.append(gradient)
        if len(gradients) > 1:
            raise ArithmeticError

    trunk.register_hook(refuse)
    with pytest.raises(ArithmeticError):
        mtl_backward(losses, features) if step == "mtl_backward" else STEPS[step](losses)
    assert len(gradients) == 2
    assert features.grad is None
    assert hidden[0].grad is not None
    assert not hidden[0].grad.any()
    assert trunk.grad is None


STEPS: dict[str, Callable[[list[Tensor]], object]] = {"backward": backward, "jac": jac}


@pytest.mark.parametrize("m", [2, 12])
def test_inputs_that_are_no_leaves_and_retain_their_gradient_get_it_once(
    truth: Truth, m: int
) -> None:
    trunk, private = _leaf(3), _leaf(3)
    inner = private * 2
    inner.retain_grad()
    features = trunk.sin()
    losses = [(features * inner).square().sum() * (k + 1) for k in range(m)]
    expected = truth(losses, [trunk, inner])
    inner.grad = None
    mtl_backward(losses, features, shared_params=[trunk], tasks_params=[[inner]] * m)
    torch.testing.assert_close(trunk.jac, expected[0])
    torch.testing.assert_close(inner.grad, expected[1].sum(0))
