from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from tests.core.autojac.conftest import Truth

CHUNK_SIZES = [None, 1, 2, 3, 100]


def _leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_a_vector_of_losses_of_a_network_has_one_row_per_element(
    truth: Truth, chunk_size: int | None
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    losses = model(torch.randn(7, 5, dtype=torch.float64)).square().mean(dim=0)
    expected = truth([losses], list(model.parameters()))

    backward(losses, parallel_chunk_size=chunk_size)

    for parameter, jacobian in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.jac, jacobian, rtol=1e-12, atol=1e-14)
        assert parameter.grad is None


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_several_outputs_of_several_shapes_over_a_branching_graph(
    truth: Truth, chunk_size: int | None
) -> None:
    a, b, c = _leaf(3), _leaf(2, 3), _leaf()
    hidden = (b @ a).sin()
    shared = hidden * c
    outputs = [shared.sum(), (shared * hidden).view(1, 2), a.square() * c, hidden.exp().prod()]
    expected = truth(outputs, [a, b, c])

    backward(outputs, parallel_chunk_size=chunk_size)

    for leaf, jacobian in zip([a, b, c], expected, strict=True):
        assert leaf.jac.shape == (7, *leaf.shape)
        torch.testing.assert_close(leaf.jac, jacobian, rtol=1e-12, atol=1e-14)


def test_a_tensor_used_many_times_gets_the_sum_of_its_uses(truth: Truth) -> None:
    w = _leaf(3, 3)
    x = torch.randn(3, dtype=torch.float64)
    for _ in range(4):
        x = torch.tanh(w @ x) + w.diagonal()
    expected = truth([x], [w])
    backward(x)
    torch.testing.assert_close(w.jac, expected[0], rtol=1e-12, atol=1e-14)


def test_only_the_inputs_asked_for_get_a_jac(truth: Truth) -> None:
    a, b = _leaf(2), _leaf(2)
    losses = a * b
    [expected] = truth([losses], [b])
    backward(losses, inputs=[b])
    torch.testing.assert_close(b.jac, expected)
    assert not hasattr(a, "jac")


def test_inputs_that_no_loss_reaches_get_no_jac() -> None:
    a, b = _leaf(2), _leaf(2)
    backward(a * 2, inputs=[a, b])
    assert a.jac.shape == (2, 2)
    assert not hasattr(b, "jac")


def test_repeated_inputs_count_once(truth: Truth) -> None:
    a = _leaf(2)
    losses = a.square()
    [expected] = truth([losses], [a])
    backward(losses, inputs=[a, a])
    torch.testing.assert_close(a.jac, expected)


def test_frozen_parameters_are_skipped() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    backward(layer(torch.randn(2)), inputs=layer.parameters())
    assert layer.weight.jac.shape == (2, 2, 2)
    assert not hasattr(layer.bias, "jac")


@pytest.mark.parametrize(
    "kind",
    [
        torch.ones(2, dtype=torch.int8),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=["quantized", "complex", "sparse", "meta"],
)
def test_frozen_parameters_may_be_of_any_kind(kind: Tensor) -> None:
    frozen = nn.Parameter(kind, requires_grad=False)
    layer = nn.Linear(2, 2)
    parameters = [*layer.parameters(), frozen]
    losses = layer(torch.ones(3, 2)).square().mean(0)
    expected = [
        torch.autograd.grad(losses.sum(), p, retain_graph=True)[0] for p in layer.parameters()
    ]

    def mtl_step() -> None:
        features = losses * 1
        mtl_backward(features.unbind(), features, shared_params=parameters, retain_graph=True)

    for rows in (partial(backward, losses, inputs=parameters, retain_graph=True), mtl_step):
        rows()
        jac_to_grad(parameters, lambda matrix: matrix.sum(0))
        for parameter, gradient in zip(layer.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient)
            parameter.grad = None
    gramian_backward(losses, torch.diag, inputs=parameters, retain_graph=True)
    assert layer.weight.grad is not None


def test_parameters_without_values_that_get_nothing_are_passed_by() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    backward(used(torch.ones(3, 2)).square().mean(0))
    jac_to_grad([*used.parameters(), *unused.parameters()], lambda matrix: matrix.sum(0))
    assert used.weight.grad is not None
    assert unused.weight.grad is None


def test_jacobians_of_several_calls_are_summed_in_place(truth: Truth) -> None:
    a = _leaf(2)
    [first] = truth([a.square()], [a])
    [second] = truth([a.exp()], [a])
    backward(a.square())
    before = a.jac
    backward(a.exp())
    assert a.jac is before
    torch.testing.assert_close(a.jac, first + second)


def test_initial_jacobians_multiply_from_the_left(truth: Truth) -> None:
    a, b = _leaf(3), _leaf(2)
    outputs = [a.sin() * b.sum(), b.exp()]
    initial = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)]
    whole = torch.cat(initial, dim=1)
    expected = [
        (whole @ jacobian.flatten(1)).view(4, *jacobian.shape[1:])
        for jacobian in truth(outputs, [a, b])
    ]
    backward(outputs, jac_tensors=initial)
    torch.testing.assert_close(a.jac, expected[0])
    torch.testing.assert_close(b.jac, expected[1])


def test_a_loss_without_graph_gives_a_zero_row(truth: Truth) -> None:
    a = _leaf(2)
    present = a.square().sum()
    [expected] = truth([present], [a])
    backward([torch.tensor(3.0, dtype=torch.float64), present, torch.tensor([1.0, 2.0])])
    torch.testing.assert_close(a.jac[1:2], expected)
    assert a.jac.shape == (4, 2)
    assert a.jac[[0, 2, 3]].eq(0).all()


def test_a_loss_that_diverges_leaves_the_rows_of_the_others_alone(truth: Truth) -> None:
    a = _leaf(2)
    fine = (a * 2).sum()
    diverged = (a - a.detach()).sqrt().sum()  # infinite derivative, finite value
    backward([fine, diverged])
    assert a.jac[0].tolist() == [2.0, 2.0]
    assert a.jac[1].isinf().all()


def test_the_graph_is_freed_unless_retained() -> None:
    a = _leaf(3)
    losses = a.exp()
    backward(losses, retain_graph=True)
    backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        backward(losses)
    torch.testing.assert_close(a.jac, 2 * a.exp().diag().detach())


def test_a_non_leaf_input_that_retains_grad_gets_a_jac(truth: Truth) -> None:
    a = _leaf(3)
    hidden = a.sin()
    hidden.retain_grad()
    losses = hidden.square()
    [expected] = truth([losses], [hidden])
    backward(losses, inputs=[hidden])
    torch.testing.assert_close(hidden.jac, expected)
    assert not hasattr(a, "jac")


def test_a_leaf_may_be_differentiated_itself() -> None:
    a = _leaf(2)
    backward(a)
    assert a.jac.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_jacobians_of_different_inputs_share_no_memory() -> None:
    a, b = _leaf(2), _leaf(2)
    initial = torch.ones(1, 2, dtype=torch.float64)
    backward(a + b, jac_tensors=initial)
    a.jac.add_(1.0)
    assert b.jac.tolist() == [[1.0, 1.0]]
    assert initial.tolist() == [[1.0, 1.0]]


def test_mixed_dtypes_give_each_input_rows_of_its_own_dtype(truth: Truth) -> None:
    a, b = _leaf(2, dtype=torch.float32), _leaf(2)
    losses = a.double() * b
    expected = truth([losses], [a, b])
    backward(losses)
    assert a.jac.dtype == torch.float32
    assert b.jac.dtype == torch.float64
    torch.testing.assert_close(a.jac, expected[0])
    torch.testing.assert_close(b.jac, expected[1])


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="needs torch 2.9")
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_rows_have_the_dtype_of_a_leaf_that_asks_for_gradients_of_another(
    chunk_size: int | None,
) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    w.grad_dtype = torch.float32
    backward(w.float() ** 2, parallel_chunk_size=chunk_size)
    assert torch.equal(w.jac, torch.diag(2 * w.detach()))
    jac_to_grad(w, lambda jacobian: jacobian.sum(0))
    assert w.grad.dtype == torch.float32


def test_inputs_with_no_element_are_allowed() -> None:
    a, empty = _leaf(2), _leaf(0)
    backward(a * (1 + empty.sum()))
    assert empty.jac.shape == (2, 0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_hooks_of_leaves_act_on_every_row_and_are_left_in_place(
    truth: Truth, chunk_size: int | None
) -> None:
    a, b = _leaf(3), _leaf(3)
    a.register_hook(lambda gradient: 2 * gradient)
    losses = (a * b).cumsum(0)
    expected = truth([losses], [a, b])
    torch.testing.assert_close(expected[0][0, 0], 2 * b.detach()[0])

    backward(losses, parallel_chunk_size=chunk_size)

    torch.testing.assert_close(a.jac, expected[0])
    torch.testing.assert_close(b.jac, expected[1])
    assert len(a._backward_hooks) == 1
    assert not b._backward_hooks
