from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jdcore.errors import NonDifferentiableError


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: object, source: Tensor, result: Tensor) -> Tensor:
        del source  # only there to make the result depend on it
        ctx.method = repr(method)
        # A view, so that the detached tensor of the caller stays outside of the graph.
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NonDifferentiableError(ctx.method)


def forbid_differentiation(method: object, source: Tensor, result: Tensor) -> Tensor:
    """
    Tie a detached result to its source so that differentiating through it raises.

    :raises NonDifferentiableError: In the backward pass, naming ``method``.
    """
    # A training step asks for no graph: the function, and what it would keep, is spared.
    if not (source.requires_grad and torch.is_grad_enabled()):
        return result
    return _Barrier.apply(method, source, result)  # type: ignore[no-untyped-call, no-any-return]
