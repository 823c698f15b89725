from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attrs import evolve
from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._fields import write_grads
from jdcore._modes import plain_modes
from jdcore.aggregation import GramianAggregator, as_weighting
from jdcore.autogram._functions import step_of
from jdcore.autojac._backward import reached
from jdcore.autojac._gradients import as_matrix
from jdcore.autojac._initial import Call
from jdcore.autojac._jac_to_grad import aggregate_blocks
from jdcore.distributed._sharding import Gathered, local_part
from jdcore.distributed._step import LocalRows
from jdcore.distributed._teams import Team, find_team
from jdcore.graph import reach
from jdcore.validators import check_flag


@not_traced
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
        Otherwise it may be freed, but is not where the step reads what operations saved after its
        last pass, or tries for the first time to differentiate several rows at once: it then lives
        as long as the losses, and another differentiation is no error.
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
    step = evolve(step_of(tensors, inputs, None, None, "tensors"), shape=None)
    flag = check_flag(retain_graph, "retain_graph")
    # Losses of whole batches have no samples that could be told apart between processes: their rows
    # are averaged, and for that they have to be there.
    team = find_team(Gathered().shards(step.wanted), group, named=inputs is not None)
    if team is None:
        return step.backward(chosen, retain_graph=flag)
    weights = _by_team(step.objectives.outputs, chosen, inputs, team, retain_graph=flag)
    return step.for_user(weights)


def _by_team(
    outputs: Sequence[Tensor],
    weighting: Callable[[Tensor], Tensor],
    inputs: Tensor | Iterable[Tensor] | None,
    team: Team,
    *,
    retain_graph: bool,
) -> Tensor:
    """For tensors that several processes hold together, which hold rows until all have theirs."""
    call = Call(list(outputs), None, reach(outputs))
    targets = reached(call.graph, inputs)

    # Called inside of the step of all processes, so that an error is told to the others instead of
    # leaving them waiting.
    def local() -> LocalRows:
        rows = call.jacobian(targets, retain_graph=retain_graph)()
        return LocalRows({target: as_matrix(local_part(rows[target])) for target in targets})

    with plain_modes([*outputs, *targets]):
        update = team.aggregate(
            local, GramianAggregator(weighting), list(outputs), aggregate_blocks
        )
    write_grads(update.gradients)
    assert update.weights is not None
    return update.weights
