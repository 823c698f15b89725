"""Functions whose backward writes into the gradient that it is given, which a sum shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward
from jdcore.errors import ParameterError, RowByRowWarning
from tests.core.autogram.oracle import relative_error


class _Clipped(torch.autograd.Function):
    """As in networks with binary weights: the gradient of what is clipped is set to zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.in_place = in_place
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if not ctx.in_place:
            grad = grad.clone()
        grad[x.abs() > 0.5] = 0
        return grad, None


class _ClippedToo(_Clipped):
    """Another function, which no test has run before."""


class _Batched(torch.autograd.Function):
    """The same, of which torch makes another function inside of ``vmap``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.mul_(ctx.saved_tensors[0].abs() <= 0.5)


# And an operation that is registered, whose function torch makes as well.
_registered = torch.library.custom_op(
    "jdcore_tests::clipped", _Batched.forward, mutates_args=(), schema="(Tensor x) -> Tensor"
)
_registered.register_autograd(_Batched.backward, setup_context=_Batched.setup_context)

FUNCTIONS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "function": _Clipped.apply,
    "in vmap": lambda x, _: torch.vmap(_Batched.apply)(x),
    "registered": lambda x, _: _registered(x.clone()),
}


class _Residual(nn.Module):
    def __init__(self, function: Any, shortcut_first: bool) -> None:
        super().__init__()
        self.trunk, self.branch, self.shortcut = (nn.Linear(5, 5) for _ in range(3))
        self.function, self.shortcut_first = function, shortcut_first

    def forward(self, x: Tensor, in_place: bool = True) -> Tensor:
        hidden = 3 * self.trunk(x).tanh()
        if self.shortcut_first:
            shortcut = self.shortcut(hidden)
        branch = self.function(self.branch(hidden), in_place)
        if not self.shortcut_first:
            shortcut = self.shortcut(hidden)
        return shortcut + branch


def _rows(model: nn.Module, losses: Tensor) -> Tensor:
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("shortcut_first", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_others_noted_of_it_is_not_changed(
    function: Callable[[Tensor, bool], Tensor], batch_dim: int | None, shortcut_first: bool
) -> None:
    model = _Residual(function, shortcut_first).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def losses() -> Tensor:
        squares: Tensor = model(x).square()
        return squares.sum(1) if batch_dim == 0 else squares.sum(0)

    jacobian = _rows(model, losses())
    weights = torch.arange(1.0, 1 + len(jacobian), dtype=torch.float64)
    engine = Engine(model, batch_dim=batch_dim)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RowByRowWarning)
            assert relative_error(engine.compute_gramian(losses()), jacobian @ jacobian.T) < 1e-12
            assert engine.verify(losses()).worst < 1e-12
            for step in (
                lambda: engine.backward(losses(), lambda gramian: weights),
                lambda: gramian_backward(losses(), lambda gramian: weights),
            ):
                step()
                grads = torch.cat([p.grad.flatten() for p in model.parameters()])
                assert relative_error(grads, weights @ jacobian) < 1e-12
                model.zero_grad()


def test_samples_get_a_pass_each_with_a_warning_that_says_why() -> None:
    model = _Residual(_Clipped.apply, True)
    losses = model(torch.randn(3, 5)).square().sum(1)
    with pytest.warns(RowByRowWarning, match="writes into the gradients"):
        Engine(model, batch_dim=0).compute_gramian(losses)


def test_a_function_that_begins_to_do_so_is_refused_once() -> None:
    model = _Residual(_ClippedToo.apply, True)
    engine, x = Engine(model, batch_dim=0), torch.randn(3, 5)
    engine.compute_gramian(model(x, False).square().sum(1))
    with pytest.raises(ParameterError, match="_ClippedToo, whose backward writes into"):
        engine.backward(model(x, True).square().sum(1), torch.diag)
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(RowByRowWarning, match="writes into the gradients"):
        engine.backward(model(x, True).square().sum(1), torch.diag)
