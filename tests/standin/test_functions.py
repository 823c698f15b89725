"""Functions in C++ whose backward does what torch asks it not to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import autogram
from jdcore.autojac import backward, gramian_backward, jac
from jdcore.errors import ParameterError
from jdcore.graph import reach
from tests.core.autogram.oracle import explicit_jacobian, relative_error

Losses = Callable[[Any, Tensor, Tensor], Tensor]

LOSSES: dict[str, Losses] = {
    "mixes": lambda ops, x, weight: ops.mixes(x @ weight).square().sum(1),
    "writes": lambda ops, x, weight: _sum_of(x @ weight, ops.writes),
    "returns a buffer": lambda ops, x, weight: (x @ ops.buffered(weight)).square().sum(1),
}


def _sum_of(hidden: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    # The sum hands one gradient to both of its operands.
    return (function(hidden * 3) + hidden * 5).square().sum(1)


def _weight_and_input() -> tuple[nn.Parameter, Tensor]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(4, 3)), torch.randn(5, 4)


@pytest.mark.filterwarnings("ignore::jdcore.errors.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("losses_of", LOSSES.values(), ids=LOSSES)
def test_the_gramian_is_that_of_rows(
    standin: Any, losses_of: Losses, batch_dim: int | None
) -> None:
    weight, x = _weight_and_input()
    for _ in range(2):  # with what is known of the function from the first time
        losses = losses_of(standin, x, weight)
        rows = explicit_jacobian(losses, [weight])
        gramian = autogram.gramian(losses, inputs=[weight], batch_dim=batch_dim)
        assert relative_error(gramian, rows @ rows.T) < 1e-6
        autogram.backward(losses, torch.diag, inputs=[weight], batch_dim=batch_dim)
        update = (rows @ rows.T).diag() @ rows
        assert weight.grad is not None
        assert relative_error(weight.grad.flatten(), update) < 1e-6
        weight.grad = None


@pytest.mark.parametrize("losses_of", LOSSES.values(), ids=LOSSES)
def test_the_rows_are_those_of_single_passes(standin: Any, losses_of: Losses) -> None:
    weight, x = _weight_and_input()
    losses = losses_of(standin, x, weight)
    assert reach([losses]).functions
    rows = explicit_jacobian(losses, [weight])
    assert relative_error(jac(losses, weight)[0].flatten(1), rows) < 1e-6


def test_one_that_accumulates_by_itself_is_refused(standin: Any) -> None:
    weight, x = _weight_and_input()
    calls: list[Callable[[Tensor], Any]] = [
        lambda losses: autogram.gramian(losses, inputs=[weight], batch_dim=0),
        lambda losses: autogram.gramian(losses, inputs=[weight], batch_dim=None),
        lambda losses: gramian_backward(losses, torch.diag),
        backward,
    ]
    for call in calls:
        losses = (x @ standin.accumulates(weight) + x @ weight).square().sum(1)
        with pytest.raises(ParameterError, match=r"accumulates into"):
            call(losses)
        assert weight.grad is None
