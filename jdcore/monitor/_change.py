from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


def first_order_change(
    losses: Callable[[], Tensor],
    step: Mapping[Tensor, Tensor],
    /,
    *,
    before: Mapping[Tensor, Tensor] | None = None,
) -> Tensor:
    """
    Changes ``J Δθ`` of losses by a step Δθ of their parameters, to first order.

    A positive entry means that the step raises this loss, however well its direction fitted before
    an optimizer added momentum or scaled its coordinates.

    The losses are evaluated once more and differentiated twice (``J Δθ`` is the derivative of
    ``(Jᵀ v)·Δθ`` with respect to v), which takes operations that can be differentiated twice. The
    random numbers of the evaluation are its own, so layers such as dropout draw other ones than
    those of the training, and running statistics are updated once more.

    :param losses: Evaluates the losses, a Tensor [m] or of any other shape, with gradients.
    :param step: Step Δθ of each parameter, of its shape. Parameters that are left out do not move.
    :param before: Values of the parameters at which the losses are differentiated, if other than
        the present ones, which are put back afterwards.
    :returns: The changes, of the shape and dtype of the losses.
    :raises ParameterError: If the losses do not depend on any of the parameters, there are none,
        one is frozen, or what is given for one is not of its shape.

    >>> import torch
    >>> from jdcore.monitor import first_order_change
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> first_order_change(lambda: torch.stack([w.sum(), -w[0]]), {w: torch.tensor([0.5, 0.0])})
    tensor([ 0.5000, -0.5000])
    """
    if not isinstance(step, Mapping) or not step:
        got = describe_tensor(step) if step else "none"
        raise ParameterError("step", "of at least one parameter, as a mapping", got)
    _check_values(step, "step")
    _check_values(before or {}, "before")
    # The optimizer has stepped already: the change is told from where the step began.
    present = {p: p.detach().clone() for p in before} if before else {}
    try:
        _assign(before or {})
        # The generators go on as if nothing had been evaluated, so that the training is the same
        # with a record.
        with torch.enable_grad(), torch.random.fork_rng(devices=_cuda_devices(step)):
            return _derivative(losses(), step)
    finally:
        _assign(present)


def _derivative(values: Tensor, step: Mapping[Tensor, Tensor]) -> Tensor:
    """The derivative of the values of losses along a step."""
    if not isinstance(values, Tensor) or not values.requires_grad:
        raise ParameterError(
            "losses", "one that returns differentiable losses", describe_tensor(values)
        )
    # Any v will do, as (Jᵀ v)·Δθ is linear in it.
    directions = torch.zeros_like(values, requires_grad=True)
    gradients = torch.autograd.grad(
        values, list(step), directions, create_graph=True, allow_unused=True
    )
    # `None` for parameters that these losses do not reach; their part of the step changes nothing.
    pairs = zip(gradients, step.values(), strict=True)
    terms = [(g * delta).sum().to(values.dtype) for g, delta in pairs if g is not None]
    if not terms:
        raise ParameterError(
            "losses", "a function of the parameters in `step`", "losses that reach none"
        )
    [change] = torch.autograd.grad(torch.stack(terms).sum(), directions)
    return change.detach()


def _check_values(values: Mapping[Tensor, Tensor], name: str) -> None:
    for parameter, value in values.items():
        if not parameter.requires_grad:
            raise ParameterError(name, "of parameters that require grad", "a frozen one")
        # Others would be broadcast.
        if value.shape != parameter.shape:
            expected = f"of shape {list(parameter.shape)} for a parameter of this shape"
            raise ParameterError(name, expected, describe_tensor(value))


@torch.no_grad()
def _assign(values: Mapping[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        # In place, as the graph of the user's closure, optimizers and views refer to this very
        # tensor.
        parameter.copy_(value)


def _cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({t.device.index for t in tensors if t.is_cuda and t.device.index is not None})
