"""The truth: Jacobians row by row, from ordinary backward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jdcore.autogram import Engine


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))


def explicit_jacobian(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[m, n] with one ordinary gradient per row, unused parameters as zeros."""
    rows = []
    for loss in losses.reshape(-1):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs]
        rows.append(torch.cat([g.reshape(-1) for g in dense]))
    return torch.stack(rows)


def generalized(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """[m1, ..., mk, mk, ..., m1] entry by entry, from the definition."""
    total = matrix.new_empty(*shape, *reversed(shape))
    indices = [
        tuple(i) for i in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape))
    ]
    for row, i in enumerate(indices):
        for column, j in enumerate(indices):
            total[(*i, *reversed(j))] = matrix[row, column]
    return total


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check_engine(
    make: Callable[[], nn.Module],
    losses_of: Callable[[nn.Module], Tensor],
    batch_dim: int | None,
    modules_of: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: [model],
) -> Engine:
    """In both precisions; returns the engine of the float64 model."""
    engine = check_float64(make, losses_of, batch_dim, modules_of)
    check_float32(make, losses_of, batch_dim, modules_of)
    return engine


def check_float64(
    make: Callable[[], nn.Module],
    losses_of: Callable[[nn.Module], Tensor],
    batch_dim: int | None,
    modules_of: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: [model],
    tolerance: float = 1e-12,
) -> Engine:
    """
    Gramian, two-pass gradient and fused gradient of a model against the explicit Jacobian.

    Random numbers are the same in every forward pass.
    """
    torch.manual_seed(0)
    model = make()
    engine = Engine(*modules_of(model), batch_dim=batch_dim)
    reached = parameters_of([model])
    inside = parameters_of(modules_of(model))

    torch.manual_seed(1)
    losses = losses_of(model)
    jacobian = explicit_jacobian(losses, inside)
    whole = explicit_jacobian(losses, reached)
    expected = jacobian @ jacobian.T
    gramian = engine.compute_gramian(losses)
    assert gramian.shape == (*losses.shape, *reversed(losses.shape))
    if losses.ndim > 1:
        expected = generalized(expected, losses.shape)
    assert relative_error(gramian, expected.reshape(gramian.shape)) <= tolerance
    assert all(p.grad is None for p in reached)

    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2)).to(losses)
    update = weights.reshape(-1) @ whole
    losses.backward(weights)
    assert relative_error(_gathered(reached), update) <= tolerance
    for p in reached:
        p.grad = None
    torch.manual_seed(1)
    losses = losses_of(model)
    returned = engine.backward(losses, lambda _: weights)
    assert torch.equal(returned, weights)
    assert relative_error(_gathered(reached), update) <= tolerance
    return engine


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def check_float32(
    make: Callable[[], nn.Module],
    losses_of: Callable[[nn.Module], Tensor],
    batch_dim: int | None,
    modules_of: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: [model],
    tolerance: float = 1e-6,
) -> None:
    """
    Gramian and fused gradient in float32 against the float64 truth of the same parameters.

    Random numbers are the same in every forward pass.
    """
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model = make()
        double = copy.deepcopy(model).double()
        engine = Engine(*modules_of(model), batch_dim=batch_dim)
        torch.manual_seed(1)
        gramian = engine.compute_gramian(losses_of(model))
        assert gramian.dtype == torch.float32
    with default_dtype(torch.float64):
        torch.manual_seed(1)
        losses = losses_of(double)
        jacobian = explicit_jacobian(losses, parameters_of(modules_of(double)))
        whole = explicit_jacobian(losses, parameters_of([double]))
        weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2)).float()
    flat = flattened(gramian, losses.ndim)
    assert relative_error(flat, jacobian @ jacobian.T) <= tolerance
    with default_dtype(torch.float32):
        torch.manual_seed(1)
        engine.backward(losses_of(model), lambda _: weights)
    update = weights.double().reshape(-1) @ whole
    assert relative_error(_gathered(parameters_of([model])), update) <= tolerance


def flattened(gramian: Tensor, ndim: int) -> Tensor:
    """[m1, ..., mk, mk, ..., m1] as a matrix [m, m]."""
    order = [*range(ndim), *reversed(range(ndim, 2 * ndim))]
    m = gramian.shape[:ndim].numel()
    return gramian.permute(order).reshape(m, m)


def _gathered(parameters: Sequence[Tensor]) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    return torch.cat([g.reshape(-1) for g in grads])


def randn(*shape: int) -> Tensor:
    """The same numbers in every call, in the default dtype."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # First of all rounded, so that models of any dtype see the very same.
    return numbers.float().to(torch.get_default_dtype())
