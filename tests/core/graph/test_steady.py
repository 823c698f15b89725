"""What the form of a graph does not tell of where its samples go is shown at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jdcore import JDCoreError, autogram
from jdcore.autogram import Engine
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error

# Sparse matrices in rows are called a beta by torch.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

B = 4


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _apart() -> Tensor:
    """An adjacency of samples by which they stay apart."""
    return torch.eye(B)


def _mixing() -> Tensor:
    adjacency = torch.eye(B)
    adjacency[0, 2] = 2.0
    return adjacency


_Layer = Callable[[Tensor, Tensor], Tensor]

_SPARSE: dict[str, _Layer] = {
    "coo": lambda a, x: a.to_sparse() @ x,
    "csr": lambda a, x: a.to_sparse_csr() @ x,
    "sparse.mm": lambda a, x: torch.sparse.mm(a.to_sparse(), x),
    "addmm": lambda a, x: torch.addmm(x, a.to_sparse(), x),
    "bmm": lambda a, x: torch.bmm(a[None].to_sparse(), x[None])[0],
    "mv": lambda a, x: torch.stack([a.to_sparse() @ column for column in x.unbind(1)], 1),
}


def _right_or_refused(losses: Tensor, *inputs: Tensor) -> bool:
    jacobian = explicit_jacobian(losses, inputs)
    try:
        gramian = autogram.gramian(losses, inputs=inputs, batch_dim=0)
    except JDCoreError:
        return False
    assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12
    return True


@pytest.mark.parametrize("name", _SPARSE)
def test_sparse_adjacencies_may_change_from_step_to_step(name: str) -> None:
    weight = randn(3, 3).requires_grad_()

    def losses(adjacency: Tensor) -> Tensor:
        passed = _SPARSE[name](adjacency, (randn(B, 3) @ weight).tanh())
        return (passed @ weight).square().sum(1)

    assert _right_or_refused(losses(_apart()), weight)
    _right_or_refused(losses(_mixing()), weight)
    assert _right_or_refused(losses(_apart()[[1, 0, 3, 2]]), weight)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_inputs_of_layers(
    convert: Callable[[Tensor], Tensor], batch_dim: int | None
) -> None:
    weight, bias = randn(9, 6).requires_grad_(), randn(6).requires_grad_()
    words = convert(randn(B, 9).relu())
    hidden = torch.addmm(bias, words, weight).tanh() * (words @ weight)
    losses = hidden.square().sum(1)
    jacobian = explicit_jacobian(losses, [weight, bias])
    gramian = autogram.gramian(losses, inputs=[weight, bias], batch_dim=batch_dim)
    assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12


def test_strides_decide_what_a_strided_view_shows() -> None:
    weight = randn(3, 3).requires_grad_()
    for x in (randn(B, 3), randn(3, B).T, randn(B, 3)):
        view = (x * weight[0]).tanh().as_strided((B, 3), (3, 1))
        _right_or_refused((view @ weight).square().sum(1), weight)


def test_the_scale_of_an_interpolation_decides_from_where_it_takes() -> None:
    weight = randn(3, 3).requires_grad_()
    for scale in (1.3, 1.4, 1.3):
        hidden = (randn(B, 3) @ weight).tanh().T[None]
        longer = F.interpolate(hidden, scale_factor=scale, mode="nearest")[0].T
        chosen = torch.cat([longer[:1], longer[2:]])
        _right_or_refused((chosen @ weight).square().sum(1), weight)


def test_a_bound_that_no_entry_meets_in_the_first_step_is_a_parameter_all_the_same() -> None:
    weight, bound = randn(3, 3).requires_grad_(), torch.tensor(1.0).requires_grad_()
    for shift in (9.0, -9.0):
        hidden = torch.clamp(randn(B, 3) @ weight + shift, -bound, bound)
        assert _right_or_refused(hidden.square().sum(1), weight, bound)


def _complex_power(base: Tensor, exponent: Tensor) -> Tensor:
    return ((base.abs() + 0.5) ** torch.complex(exponent, base.double())).abs()


@pytest.mark.parametrize(
    "choose", [torch.maximum, torch.fmin, torch.hypot, torch.atan2, _complex_power]
)
def test_data_choose_among_operands_of_two_dtypes(choose: Callable[..., Tensor]) -> None:
    weight = randn(3, 3).requires_grad_()
    hidden = randn(B, 3) @ weight
    losses = choose(hidden.float(), hidden.tanh() + 0.5).square().sum(1)
    jacobian = explicit_jacobian(losses, [weight])
    found = autogram.gramian(losses, inputs=[weight], batch_dim=0)
    assert relative_error(found, jacobian @ jacobian.T) < 1e-6


def test_a_derivative_that_loses_nan_hides_no_samples_that_mix() -> None:
    weight = randn(3, 3).requires_grad_()
    hidden = (randn(B, 3) @ weight).tanh()
    assert not _right_or_refused((hidden + hidden.logcumsumexp(0)).sum(1), weight)
    assert _right_or_refused((hidden + hidden.logcumsumexp(1)).sum(1), weight)


def test_a_slope_that_no_entry_meets_in_the_first_step_is_a_parameter_all_the_same() -> None:
    weight, slope = randn(3, 3).requires_grad_(), randn(3).requires_grad_()
    for sign in (1.0, -1.0):
        hidden = F.prelu((randn(B, 3) @ weight).abs() * sign, slope.exp())
        assert _right_or_refused(hidden.square().sum(1), weight, slope)


def test_constants_around_an_operand_decide_where_it_lies_between_them() -> None:
    weight = randn(3, 1).requires_grad_()
    for before in (1, 2, 0, 3):
        parts = [torch.ones(before), (randn(B, 3) @ weight)[:, 0], torch.ones(3 - before)]
        assert _right_or_refused(torch.cat(parts).square(), weight)


def test_the_size_of_a_constant_kernel_decides_what_it_reads() -> None:
    weight = randn(3, 2).requires_grad_()
    for size in (1, 2, 1):
        hidden = (randn(8, 3) @ weight).T[None]
        read = F.conv1d(hidden, randn(1, 2, size), stride=4, padding=1)
        assert read.shape == (1, 1, 3)
        assert _right_or_refused(read[0, 0].square(), weight)


class Flip(torch.autograd.Function):
    """Its node is called as one of torch is, but for the number, and data decide what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(grad).index_copy(0, ctx.order, grad), None


def test_functions_of_python_are_not_taken_for_operations_of_the_same_name() -> None:
    weight = randn(3, 3).requires_grad_()

    def losses(*order: int) -> Tensor:
        passed: Tensor = Flip.apply((randn(B, 3) @ weight).tanh(), torch.tensor(order))  # type: ignore[no-untyped-call]
        return (passed @ weight).square().sum(1)

    for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)):
        assert _right_or_refused(losses(*order), weight)


def test_sparse_products_of_bfloat16_keep_samples_apart() -> None:
    model = nn.Linear(2, 2, bias=False).bfloat16()
    losses = _SPARSE["coo"](_apart().bfloat16(), model(torch.ones(B, 2).bfloat16())).sum(1)
    assert "closed form" in Engine(model, batch_dim=0).explain(losses)
