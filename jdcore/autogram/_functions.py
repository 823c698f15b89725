from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from jdcore._modes import plain_modes
from jdcore.aggregation import as_weighting
from jdcore.autogram._engine import result_dtype, shaped
from jdcore.autogram._losses import (
    checked_batch_dim,
    checked_budget,
    objectives_of,
    wanted_leaves,
)
from jdcore.autogram._step import Step
from jdcore.autogram._together import backward_together
from jdcore.distributed._holders import find_holders
from jdcore.distributed._sharding import Gathered
from jdcore.distributed._teams import find_team
from jdcore.graph import Plans
from jdcore.validators import check_flag

# One for all calls, as there is no object that could keep it; graphs are told apart by their form
# and by which tensors are wanted.
_PLANS = Plans()


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
    chosen = as_weighting(weighting)
    check_flag(retain_graph, "retain_graph")
    check_flag(second_pass, "second_pass")
    check_flag(per_process, "per_process")
    step = _step(losses, inputs, batch_dim, memory_budget, "losses")
    holders = find_holders(step.wanted, group, named=inputs is not None)
    if holders is not None:
        with plain_modes(step.wanted):
            weights = backward_together(
                lambda: step,
                holders,
                chosen,
                retain_graph=retain_graph,
                second_pass=second_pass,
                per_process=per_process,
            )
        return weights.to(result_dtype(step.objectives.outputs[0]), copy=True)
    weights = step.backward(
        chosen,
        _shape_of(losses),
        retain_graph=retain_graph,
        second_pass=second_pass,
    )
    return weights.to(result_dtype(step.objectives.outputs[0]), copy=True)


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
    step = _step(losses, inputs, batch_dim, memory_budget, "losses")
    return shaped(step.gramian(), step.objectives.outputs[0], _shape_of(losses))


def gramian_backward(
    tensors: Tensor | Sequence[Tensor],
    /,
    weighting: Callable[[Tensor], Tensor],
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    group: Any = None,
) -> Tensor:
    """
    One step of a Gramian method without holding its Jacobian: straight to the ``.grad``.

    The same update as ``backward`` followed by ``jac_to_grad`` of :mod:`jdcore.autojac`, and the
    same computation as :func:`jdcore.autogram.backward` with ``batch_dim=None``, for the flattened
    losses. The weight of a
    linear layer that is used once, on fewer samples than it has inputs, needs no rows at all: its
    share comes from the gradients at the layer. Rows that take more than 512 MB are not kept:
    they are summed up for some parameters after the other, and a second pass takes the gradients.

    :param tensors: What to differentiate. All their elements, in order, are the m objectives.
    :param weighting: A weighting, or the aggregator of one. A plain function is taken as a
        weighting: Gramian [m, m] to weights [m].
    :param inputs: Tensors with respect to which to differentiate. By default all leaves behind
        ``tensors``.
    :param retain_graph: Whether to keep the graph for another differentiation.
    :param group: The process group whose processes hold the tensors, as for
        :func:`~jdcore.autojac.jac_to_grad`. On several processes rows are held.
    :returns: The weights [m], float64 for float64 losses, else float32. Taken from a second pass,
        gradients are those of weights rounded to the dtype of the losses.
    :raises ParameterError: If an argument does not fit; see its message.

    >>> import torch
    >>> from jdcore.autojac import gramian_backward
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gramian_backward([w.sum(), (w**2).sum()], lambda gramian: gramian.diagonal().rsqrt())
    tensor([0.7071, 0.2236])
    >>> w.grad
    tensor([1.1543, 1.6015])
    """
    chosen = as_weighting(weighting)
    step = _step(tensors, inputs, None, None, "tensors")
    flag = check_flag(retain_graph, "retain_graph")
    # Losses of whole batches have no samples that could be told apart between processes: their rows
    # are averaged, and for that they have to be there.
    team = find_team(Gathered().shards(step.wanted), group, named=inputs is not None)
    if team is not None:
        from jdcore.autojac._together import gramian_step  # autojac has this function, too

        weights = gramian_step(step.objectives.outputs, chosen, inputs, team, retain_graph=flag)
    else:
        weights = step.backward(chosen, None, retain_graph=flag, second_pass=False)
    return weights.to(result_dtype(step.objectives.outputs[0]), copy=True)


def _shape_of(losses: Tensor | Sequence[Tensor]) -> Sequence[int] | None:
    """The shape of a generalized Gramian; None for the ordinary one, of a vector or of a list."""
    return losses.shape if isinstance(losses, Tensor) and losses.ndim != 1 else None


def _step(
    losses: Tensor | Sequence[Tensor],
    inputs: Tensor | Iterable[Tensor] | None,
    batch_dim: int | None,
    budget: int | None,
    parameter: str,
) -> Step:
    objectives = objectives_of(losses, checked_batch_dim(batch_dim), parameter)
    wanted = Gathered().leaves(wanted_leaves(objectives, inputs))
    return Step(objectives, wanted, _PLANS, "inputs", checked_budget(budget), False)
