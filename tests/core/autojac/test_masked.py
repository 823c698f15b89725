"""Tensors of ``torch.masked`` in a graph, whose gradients have entries without a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.masked import as_masked_tensor, masked_tensor

from jdcore import ParameterTypeError
from jdcore.autogram import backward as weighted_backward
from jdcore.autogram import gramian
from jdcore.autojac import backward, gramian_backward, jac, mtl_backward

# Both of torch.masked itself: that it is a prototype, and that it wraps what requires grad.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of MaskedTensors",
    "ignore:It is not recommended to create a MaskedTensor",
)

MASK = torch.tensor([[True, False, True], [False, True, True]])
STEPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "backward": lambda w, losses: backward(losses, inputs=w),
    "one by one": lambda w, losses: backward(losses, inputs=w, parallel_chunk_size=1),
    "jac": lambda w, losses: jac(losses, w),
    "gramian_backward": lambda w, losses: gramian_backward(losses, first, inputs=w),
    "gramian": lambda w, losses: gramian(losses, inputs=w, batch_dim=None),
    "autogram.backward": lambda w, losses: weighted_backward(losses, first, batch_dim=None),
}


def first(matrix: Tensor) -> Tensor:
    return torch.ones(len(matrix))


@pytest.mark.parametrize("step", STEPS)
def test_masked_gradients_are_refused_by_name_and_nothing_is_written(step: str) -> None:
    w = torch.randn(2, 3, requires_grad=True)
    losses = as_masked_tensor(w * 2.0, MASK).sum(1).to_tensor(0.0)

    with pytest.raises(ParameterTypeError, match=r"MaskedTensor.*torch\.where"):
        STEPS[step](w, losses)

    assert w.grad is None
    assert not hasattr(w, "jac")


def test_masked_gradients_of_features_are_refused_by_name() -> None:
    w = torch.randn(2, 3, requires_grad=True)
    features = w * 2.0
    losses = as_masked_tensor(features, MASK).sum(1).to_tensor(0.0)

    with pytest.raises(ParameterTypeError, match=r"MaskedTensor.*torch\.where"):
        mtl_backward([losses[0], losses[1]], features)

    assert not hasattr(w, "jac")


def test_masked_losses_and_parameters_are_refused_by_name() -> None:
    w = torch.randn(2, 3, requires_grad=True)
    masked = masked_tensor(torch.randn(2, 3), MASK, requires_grad=True)

    with pytest.raises(ParameterTypeError, match=r"a masked Tensor.*torch\.where"):
        backward(as_masked_tensor(w * 2.0, MASK).sum(1))
    with pytest.raises(ParameterTypeError, match=r"a masked Tensor.*torch\.where"):
        jac((masked * masked).sum(1).to_tensor(0.0), masked)


@pytest.mark.parametrize("step", STEPS)
def test_the_mask_of_the_remedy_works(step: str) -> None:
    w = torch.randn(2, 3, requires_grad=True)

    STEPS[step](w, torch.where(MASK, w * 2.0, 0.0).sum(1))

    if "backward" in step and step != "backward":
        torch.testing.assert_close(w.grad, 2.0 * MASK)
