from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jdcore._modes import has_tangent
from jdcore.errors import NonDifferentiableError


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: object, source: Tensor, result: Tensor) -> Tensor:
        del source  # only there to make the result depend on it
        ctx.method = repr(method)
        # A view, so that the detached tensor of the caller stays outside of the graph.
        return result.view_as(result)

    @staticmethod
    def jvp(ctx: Any, method: Any, source: Any, tangent: Tensor) -> Tensor:
        # A result that has kept its tangent of forward-mode AD is right there; a view of a view.
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NonDifferentiableError(ctx.method)


def forbid_differentiation(method: object, source: Tensor, result: Tensor) -> Tensor:
    """
    Tie a detached result to its source so that differentiating through it raises.

    :raises NonDifferentiableError: In the backward pass, naming ``method``; now, if the source
        carries a tangent of forward-mode AD which the result has lost.
    """
    if has_tangent(source) and not has_tangent(result):
        raise NonDifferentiableError(repr(method))
    # A training step asks for no graph: the function, and what it would keep, is spared.
    if not (source.requires_grad and torch.is_grad_enabled()):
        return result
    return _Barrier.apply(method, source, result)  # type: ignore[no-untyped-call, no-any-return]
