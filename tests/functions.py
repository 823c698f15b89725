"""Functions with a backward of their own, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle


def on_accumulator(leaf: Tensor, hook: Callable[[Tensor], object]) -> RemovableHandle:
    """Hooks that run after accumulation as they were registered before torch had a name for it."""
    # It has to be kept, or it goes with its hooks.
    leaf.accumulator = get_gradient_edge(leaf).node  # type: ignore[attr-defined]
    handle: RemovableHandle = leaf.accumulator.register_hook(lambda *_: hook(leaf))  # type: ignore[attr-defined]
    return handle


AFTER_ACCUMULATION = [Tensor.register_post_accumulate_grad_hook, on_accumulator]


class Scale(torch.autograd.Function):
    """Multiplies features by a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grads[0] * scale, (grads[0] * x).flatten(0, -2).sum(0)


class Redone(torch.autograd.Function):
    """x * w, which a backward pass of its own differentiates inside of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            gx, gw = torch.autograd.grad(x * w, (x, w), grads[0])
        return gx, gw


class RedoneOnTheParameter(Redone):
    """The same, but for w alone, and down to the very tensor that the pass outside reaches."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, w = ctx.saved_tensors
        with torch.enable_grad():
            [gw] = torch.autograd.grad(x * w, w, grads[0])
        return None, gw
