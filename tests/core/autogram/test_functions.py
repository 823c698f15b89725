"""Custom functions of Python are called as autograd calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jdcore import autogram
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class _Scaled(torch.autograd.Function):
    """Between its tensors it has arguments of other kinds, and returns more than it is used for."""

    @staticmethod
    def forward(
        ctx: Any, factor: float, x: Tensor, mode: str, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.factor = factor
        ctx.save_for_backward(x, scale)
        positive = x > 0
        ctx.mark_non_differentiable(positive)
        return factor * x * scale, x + scale, positive

    @staticmethod
    def backward(
        ctx: Any, of_product: Tensor, of_sum: Tensor, of_positive: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert isinstance(of_positive, Tensor)
        x, scale = ctx.saved_tensors
        of_product = ctx.factor * of_product
        of_scale = (of_product * x + of_sum).sum_to_size(scale.shape)
        # One more than there are arguments, which autograd drops.
        return None, of_product * scale + of_sum, None, of_scale, None, None


class _Unmaterialized(torch.autograd.Function):
    """It asks for None in the place of missing gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale)
        return x * scale, x + scale

    @staticmethod
    def backward(
        ctx: Any, of_product: Tensor | None, of_sum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        of_x, of_scale = torch.zeros_like(x), torch.zeros_like(scale)
        if of_product is not None:
            of_x, of_scale = of_x + of_product * scale, of_scale + (of_product * x).sum(0)
        if of_sum is not None:
            of_x, of_scale = of_x + of_sum, of_scale + of_sum.sum(0)
        return of_x, of_scale


def _product(x: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = _Scaled.apply(2.0, x, "", scale, None)[0]  # type: ignore[no-untyped-call]
    return found


def _sum(x: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = _Scaled.apply(2.0, x, "", scale, None)[1]  # type: ignore[no-untyped-call]
    return found


def _unmaterialized(x: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = _Unmaterialized.apply(x, scale)[0]  # type: ignore[no-untyped-call]
    return found


_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of the first result": _product,
    "of the second result": _sum,
    "of both": lambda x, scale: _product(x, scale).tanh() + _sum(x, scale),
    "without zeros": _unmaterialized,
    "between a parameter and its use": lambda x, scale: x * _product(scale.exp(), scale),
    "above samples": lambda x, scale: _product(x * scale, torch.ones(3)),
}


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("use", _USES)
def test_arguments_of_all_kinds_and_missing_gradients(use: str, batch_dim: int | None) -> None:
    scale = randn(3).requires_grad_()
    losses = _USES[use](randn(4, 3), scale).square().sum(1)
    jacobian = explicit_jacobian(losses, [scale])
    weights = torch.linspace(-1, 2, 4)
    gramian = autogram.gramian(losses, inputs=[scale], batch_dim=batch_dim)
    assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12
    autogram.backward(losses, lambda _: weights, inputs=[scale], batch_dim=batch_dim)
    assert scale.grad is not None
    assert relative_error(scale.grad, weights @ jacobian) <= 1e-12


class _Quiet(torch.autograd.Function):
    """It returns None where its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad.clone() if grad.any() else None


@pytest.mark.parametrize("first", [0, 1])
def test_operations_that_only_some_tasks_reach(first: int) -> None:
    scale, shift = randn(3).requires_grad_(), randn(3).requires_grad_()
    parts = [_Quiet.apply(randn(4, 3) * scale), _Quiet.apply(randn(4, 3) + shift)]  # type: ignore[no-untyped-call]
    losses = torch.stack([part.square().sum(1) for part in (parts[first], parts[1 - first])], 1)
    jacobian = explicit_jacobian(losses.T, [scale, shift])
    weights = torch.linspace(-1, 2, 8).view(4, 2)
    gramian = autogram.gramian(losses, inputs=[scale, shift], batch_dim=0)
    ordered = gramian.transpose(0, 1).reshape(8, 8)
    assert relative_error(ordered, jacobian @ jacobian.T) <= 1e-12
    autogram.backward(losses, lambda _: weights, inputs=[scale, shift], batch_dim=0)
    assert scale.grad is not None
    assert shift.grad is not None
    update = torch.cat([scale.grad, shift.grad])
    assert relative_error(update, weights.T.flatten() @ jacobian) <= 1e-12
