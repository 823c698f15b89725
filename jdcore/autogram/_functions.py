from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from jdcore._compilation import not_traced
from jdcore.autogram._losses import (
    checked_batch_dim,
    checked_budget,
    objectives_of,
    shape_of,
    wanted_leaves,
)
from jdcore.autogram._step import Step
from jdcore.autogram._together import take_step
from jdcore.distributed._sharding import Gathered
from jdcore.graph import Plans

# One for all calls, as there is no object that could keep it; graphs are told apart by their form
# and by which tensors are wanted.
_PLANS = Plans()


@not_traced
def backward(
    losses: Tensor | Sequence[Tensor],
    /,
    weighting: Callable[[Tensor], Tensor],
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    batch_dim: int | None,
    retain_graph: bool = False,
    second_pass: bool = False,
    memory_budget: int | None = None,
    group: Any = None,
    per_process: bool = False,
) -> Tensor:
    """
    Compute the Gramian of losses, weigh it, and add the weighted gradients to the ``.grad`` fields.

    It is :meth:`Engine.backward <jdcore.autogram.Engine.backward>` for whatever has no modules.

    :param losses: A Tensor of any shape, or, without ``batch_dim``, a sequence of them, all of
        whose elements, in order, are the objectives.
    :param weighting: A :class:`~jdcore.Weighting` for a vector or a sequence of losses, a
        :class:`~jdcore.GeneralizedWeighting` for a Tensor of any other shape, or the aggregator of
        one.
    :param inputs: Tensors with respect to which the Jacobian is taken, and which get a gradient.
        By default all leaves behind the losses.
    :param batch_dim: The dimension of samples in the losses, if each loss depends on one sample
        only; None if any loss may depend on the whole batch.
    :param retain_graph: Whether to keep the graph for another backward pass.
        Otherwise it may be freed, but is not where the step reads what operations saved after its
        last pass, or tries for the first time to differentiate several rows at once: it then lives
        as long as the losses, and another differentiation is no error.
    :param second_pass: Whether to take the weighted gradients from a second backward pass instead
        of keeping what the first one found: slower, with less memory. By one process only.
    :param memory_budget: Bytes that a temporary may have; None lets the library choose.
    :param group: As for :meth:`Engine.backward <jdcore.autogram.Engine.backward>`.
    :param per_process: As there.
    :returns: The weights, of the shape of the losses, float64 for float64 losses, else float32.
    :raises ParameterError: If an argument does not fit, or the result cannot be shown to be right.
        No ``.grad`` field is changed then.

    >>> import torch
    >>> from jdcore import autogram
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> losses = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) @ w
    >>> autogram.backward(losses, lambda gramian: gramian.diagonal().rsqrt(), batch_dim=0)
    tensor([1.0000, 0.5000])
    >>> w.grad
    tensor([1., 1.])
    """
    step = step_of(losses, inputs, batch_dim, memory_budget, "losses")
    return take_step(
        lambda: step,
        weighting,
        step.wanted,
        group,
        named=inputs is not None,
        retain_graph=retain_graph,
        second_pass=second_pass,
        per_process=per_process,
    )


@not_traced
def gramian(
    losses: Tensor | Sequence[Tensor],
    /,
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    batch_dim: int | None,
    memory_budget: int | None = None,
) -> Tensor:
    """
    Compute the Gramian of the Jacobian of losses with respect to tensors.

    It is :meth:`Engine.compute_gramian <jdcore.autogram.Engine.compute_gramian>` for whatever has
    no modules; the arguments are those of :func:`backward`.

    :returns: As :meth:`~jdcore.autogram.Engine.compute_gramian`; [m, m] for a sequence of losses.
    """
    return step_of(losses, inputs, batch_dim, memory_budget, "losses").gramian()


def step_of(
    losses: Tensor | Sequence[Tensor],
    inputs: Tensor | Iterable[Tensor] | None,
    batch_dim: int | None,
    budget: int | None,
    parameter: str,
) -> Step:
    """
    What a function is asked for, checked.

    :param parameter: What the losses are called.
    """
    objectives = objectives_of(losses, checked_batch_dim(batch_dim), parameter)
    wanted = Gathered().leaves(wanted_leaves(objectives, inputs))
    return Step(
        *(objectives, wanted, _PLANS, "inputs", checked_budget(budget), False, shape_of(losses)),
        losses=parameter,
    )
