"""Weights of linear layers, whose rows are computed as products of what autograd hands out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from jdcore.autojac import _taps, backward, gramian_backward
from jdcore.autojac._products import find_products
from jdcore.graph import reach
from jdcore.graph._hooks import hooks_made_lately
from tests.core.autojac.conftest import row_by_row

# Samples, inputs and outputs of a layer; fewer samples than inputs, so that gradients suffice.
N, I, O = 3, 8, 6  # noqa: E741 - as in the formulas
Step = tuple[Tensor, list[Tensor]]


@pytest.fixture(autouse=True)
def _never_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_taps, "_WORTH_A_HOOK", 0)


def _tensor(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def _layer(inputs: int = I, outputs: int = O, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def _losses(y: Tensor) -> Tensor:
    return (y.tanh() * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).flatten(1).sum(1)


def _single(bias: bool, *shape: int) -> Step:
    layer = _layer(bias=bias)
    return _losses(layer(_tensor(*shape, I, grad=True))), list(layer.parameters())


def _stack() -> Step:
    net = nn.Sequential(_layer(), nn.Tanh(), _layer(O, I, bias=False), nn.Tanh(), _layer())
    return _losses(net(_tensor(N, I, grad=True))), list(net.parameters())


def _untransposed() -> Step:
    w = _tensor(I, O, grad=True)
    return _losses(_tensor(N, I, grad=True) @ w), [w]


def _frozen_bias() -> Step:
    layer = _layer()
    layer.bias.requires_grad_(False)
    return _losses(layer(_tensor(N, I, grad=True))), [layer.weight]


def _hook_on_the_output(bias: bool) -> Step:
    first, second = _layer(bias=bias), _layer(O, I)
    y = first(_tensor(N, I, grad=True))
    y.register_hook(lambda gradient: 10 * gradient)
    y.retain_grad()
    return _losses(second(y)), [*first.parameters(), *second.parameters()]


def _both_the_input_and_the_output_require_grad() -> Step:
    layer, x = _layer(), _tensor(N, I, grad=True)
    return _losses(layer(x)), [x, *layer.parameters()]


def _output_that_is_an_objective() -> Step:
    layer = _layer(bias=False)
    return layer(_tensor(2, I, grad=True)), [layer.weight]


def _product_that_some_objectives_do_not_reach() -> Step:
    trunk, head = _layer(), _layer(O, 4)
    features = trunk(_tensor(N, I, grad=True)).tanh()
    return torch.stack([features.sum(), head(features).square().sum()]), [
        *trunk.parameters(),
        *head.parameters(),
    ]


FOUND: dict[str, Callable[[], Step]] = {
    "bias": lambda: _single(True, N),
    "no bias": lambda: _single(False, N),
    "sequences": lambda: _single(True, N, 2),
    "sequences, no bias": lambda: _single(False, N, 2),
    "stack": _stack,
    "x @ W": _untransposed,
    "frozen bias": _frozen_bias,
    "hook": lambda: _hook_on_the_output(True),
    "hook, no bias": lambda: _hook_on_the_output(False),
    "input requires grad": _both_the_input_and_the_output_require_grad,
    "objective": _output_that_is_an_objective,
    "partial": _product_that_some_objectives_do_not_reach,
}


def _tied() -> Step:
    w = _tensor(I, I, grad=True)
    return _losses(linear(linear(_tensor(N, I), w).tanh(), w)), [w]


def _used_elsewhere() -> Step:
    w = _tensor(O, I, grad=True)
    return _losses(linear(_tensor(N, I), w)) + w.square().sum(), [w]


def _transpose_used_twice() -> Step:
    w = _tensor(O, I, grad=True)
    transposed = w.t()
    return _losses(_tensor(N, I) @ transposed) + transposed.square().sum(), [w]


def _transpose_that_is_an_objective() -> Step:
    w = _tensor(2, 2, grad=True)
    transposed = w.t()
    y = _tensor(N, 2) @ transposed
    return torch.cat([transposed.flatten(), _losses(y)]), [w]


def _scaled() -> Step:
    w = _tensor(O, I, grad=True)
    return _losses(torch.addmm(_tensor(O), _tensor(N, I), w.t(), alpha=3)), [w]


def _first_factor() -> Step:
    w = _tensor(N, I, grad=True)
    return _losses(w @ _tensor(I, O)), [w]


def _hook_on_the_weight() -> Step:
    layer = _layer(bias=False)
    layer.weight.register_hook(lambda gradient: gradient * 2)
    return _losses(layer(_tensor(N, I))), [layer.weight]


def _hook_on_the_transpose() -> Step:
    w, transposed = _transposed_after_another_layer()
    transposed.register_hook(lambda gradient: gradient * 2)
    return _losses(_tensor(N, I, grad=True).tanh() @ transposed), [w]


def _transpose_that_retains_grad() -> Step:
    w, transposed = _transposed_after_another_layer()
    transposed.retain_grad()
    return _losses(_tensor(N, I, grad=True).tanh() @ transposed), [w]


def _transposed_after_another_layer() -> tuple[Tensor, Tensor]:
    w = _tensor(O, I, grad=True)
    return w, w.t()


def _checkpointed() -> Step:
    layer = _layer()
    y = torch.utils.checkpoint.checkpoint(layer, _tensor(N, I), use_reentrant=False)
    return _losses(y), list(layer.parameters())


def _hooks_of_operations(before: float, behind: float, transposition: float) -> Step:
    w, transposed = _transposed_after_another_layer()
    y = _tensor(N, I, grad=True).tanh() @ transposed
    for node, hook in ((y.grad_fn, behind), (transposed.grad_fn, transposition)):
        assert node is not None
        if hook != 1:
            node.register_hook(partial(_scaled_gradients, hook))
    if before != 1:
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(lambda gradients: _scaled_gradients(before, gradients))
    return _losses(y), [w]


def _scaled_gradients(
    factor: float, gradients: tuple[Tensor | None, ...], _: object = None
) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else factor * g for g in gradients)


LEFT_ALONE: dict[str, Callable[[], Step]] = {
    "tied": _tied,
    "used elsewhere": _used_elsewhere,
    "transpose used twice": _transpose_used_twice,
    "transpose as objective": _transpose_that_is_an_objective,
    "scaled": _scaled,
    "first factor": _first_factor,
    "hook on the weight": _hook_on_the_weight,
    "hook on the transpose": _hook_on_the_transpose,
    "transpose that retains grad": _transpose_that_retains_grad,
    "hook before the operation": partial(_hooks_of_operations, 2, 1, 1),
    "hook behind the operation": partial(_hooks_of_operations, 1, 2, 1),
    "hook behind the transposition": partial(_hooks_of_operations, 1, 1, 2),
    "checkpoint": _checkpointed,
}
ALL = FOUND | LEFT_ALONE


@pytest.mark.parametrize("name", FOUND)
def test_weights_that_act_in_one_product_are_found(name: str) -> None:
    losses, inputs = FOUND[name]()
    matrices = [i for i, tensor in enumerate(inputs) if tensor.is_leaf and tensor.ndim == 2]
    found = find_products(reach([losses]), dict(enumerate(inputs)))
    assert found
    assert set(found) == set(matrices[1:] if name == "input requires grad" else matrices)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_weights_that_act_otherwise_too_are_left_to_autograd(name: str) -> None:
    losses, inputs = LEFT_ALONE[name]()
    assert find_products(reach([losses]), dict(enumerate(inputs))) == {}


def _double(tensor: Tensor) -> None:
    tensor.register_hook(lambda gradient: gradient * 2)


@pytest.mark.parametrize(
    "act",
    [None, lambda _: _layer().register_forward_hook(print), _double, lambda t: t.retain_grad()],
)
def test_of_a_transpose_that_torch_does_not_show_it_matters_whether_hooks_were_made_since(
    act: Callable[[Tensor], Any] | None,
) -> None:
    hooks_made_lately([])  # what others made before does not matter
    w, transposed = _transposed_after_another_layer()
    if act is not None:
        act(transposed)
    losses = _losses(_tensor(N, I) @ transposed)
    assert list(find_products(reach([losses]), {0: w})) == ([0] if act is None else [])
    [expected] = row_by_row([losses], [w])
    backward(losses, parallel_chunk_size=1)
    torch.testing.assert_close(w.jac, expected)
    assert not transposed.retains_grad or transposed.grad is not None


@pytest.mark.parametrize("name", ALL)
def test_rows_are_those_of_autograd(name: str) -> None:
    losses, inputs = ALL[name]()
    expected = row_by_row([losses], inputs)
    backward(losses, inputs=inputs, parallel_chunk_size=1)
    for tensor, jacobian in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.jac, jacobian)


@pytest.mark.parametrize("name", ALL)
def test_the_gramian_and_the_update_are_those_of_the_rows(name: str) -> None:
    losses, inputs = ALL[name]()
    rows = [jacobian.flatten(1) for jacobian in row_by_row([losses], inputs)]
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.arange(1.0, len(gramian) + 1, dtype=torch.float64)

    gramian_backward(losses, weighting, inputs=inputs)

    matrix = torch.cat(rows, dim=1)
    torch.testing.assert_close(seen[0], matrix @ matrix.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0], seen[0].T)
    weights = torch.arange(1.0, len(matrix) + 1, dtype=torch.float64)
    for tensor, row in zip(inputs, rows, strict=True):
        torch.testing.assert_close(tensor.grad.flatten(), weights @ row)


def test_float32_rows_lose_no_digits_in_the_gramian() -> None:
    layer = nn.Linear(512, 400)
    x = torch.ones(4, 512) + 1e-3 * torch.randn(4, 512)
    losses = layer(x).square().mean(dim=0)[:5]
    gradients = torch.zeros(5, 4, 400, dtype=torch.float64)
    for k in range(5):
        gradients[k, :, k] = layer(x)[:, k].detach().double() / 2
    rows = torch.einsum("kno,ni->koi", gradients, x.double()).flatten(1)
    seen: list[Tensor] = []

    gramian_backward(
        losses, lambda gramian: (seen.append(gramian), gramian[0])[1], inputs=[layer.weight]
    )

    expected = rows @ rows.T
    # What remains is the rounding of the float32 gradients of the layer's output.
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


def test_an_input_modified_in_place_gives_the_error_of_pytorch() -> None:
    layer, x = _layer(bias=False), _tensor(N, I)
    losses = _losses(layer(x))
    x.zero_()
    for call in (
        lambda: backward(losses, inputs=[layer.weight], parallel_chunk_size=1),
        lambda: gramian_backward(losses, lambda gramian: gramian[0]),
    ):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            call()
    assert layer.weight.grad is None
    assert not hasattr(layer.weight, "jac")


def test_no_hook_is_left_behind() -> None:
    losses, inputs = _stack()
    backward(losses, inputs=inputs, parallel_chunk_size=1, retain_graph=True)
    before = [tensor.jac.clone() for tensor in inputs]
    losses.sum().backward()  # a listener that was left would write rows
    for tensor, jacobian in zip(inputs, before, strict=True):
        assert torch.equal(tensor.jac, jacobian)
