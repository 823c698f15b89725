"""The computation of a step whose samples lie on several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jdcore._fields import check_grads, disjoint, write_grads
from jdcore.aggregation import GramianSource
from jdcore.autogram._step import Step, weights_of
from jdcore.distributed._exchange import Collected, Union
from jdcore.distributed._meeting import Group, Meeting
from jdcore.distributed._replicas import check_replicas
from jdcore.distributed._replicated import weights_of_first
from jdcore.distributed._step import state_kept
from jdcore.distributed._totals import mean_gradients
from jdcore.errors import ParameterError
from jdcore.graph import Jacobian, reach


def backward_together(
    step: Step,
    group: Group,
    weighting: Callable[[Tensor], Tensor],
    *,
    per_process: bool,
    retain_graph: bool,
) -> Tensor:
    """
    Weigh the samples of all processes, and write the same gradients on all.

    :param step: What there is to do with the losses of this process.
    :param group: The processes.
    :param per_process: Whether each process weighs its own samples alone.
    :returns: The weights: of all losses, or of those of this process.
    :raises ParameterError: If what the processes have does not fit together.
    :raises PeerError: If another process could not make the step.
    """
    outputs = step.objectives.outputs
    with state_kept(weighting), Meeting([group], outputs[0].device) as meeting:
        if step.objectives.batch_dim is None:
            raise ParameterError(
                "batch_dim",
                "given where the samples lie on several processes",
                None,
                "For losses of whole batches: gramian_backward, or backward and jac_to_grad.",
            )
        check_replicas(step.wanted, [reach(outputs)], step.parameter)
        jacobian = step.jacobian(together=True)
        changed = jacobian.graph.leaves if step.all_leaves else jacobian.graph.targets
        check_grads(t for t in changed.values() if t.grad is None or not t.grad.is_sparse)
        weigh = _own_weights if per_process else _all_weights
        weights, own = weigh(step, jacobian, weighting, meeting, group, retain_graph)
        if jacobian.computed:
            gradients = jacobian.weighted(own, retain_graph=retain_graph)
        else:
            gradients = jacobian.differentiated(own, retain_graph=retain_graph)
        for tensor in jacobian.graph.retained:  # those of other processes have nothing to do with
            gradients.pop(tensor, None)
        means = mean_gradients(meeting, group, gradients)
    write_grads(dict(zip(means, disjoint(means.values()), strict=True)))
    return weights


def _own_weights(
    step: Step,
    jacobian: Jacobian,
    weighting: Callable[[Tensor], Tensor],
    meeting: Meeting,
    group: Group,
    retain_graph: bool,
) -> tuple[Tensor, Tensor]:
    del meeting, group
    [output] = step.objectives.outputs
    source = GramianSource(
        step.objectives.rows,
        jacobian.graph.precision,
        output.device,
        lambda: jacobian.gramian(keep=True, retain_graph=retain_graph),
        losses=output.detach().reshape(-1),
    )
    weights = weights_of(weighting, source, None if output.ndim == 1 else output.shape)
    return weights, weights.to(output.device).reshape(-1)


def _all_weights(
    step: Step,
    jacobian: Jacobian,
    weighting: Callable[[Tensor], Tensor],
    meeting: Meeting,
    group: Group,
    retain_graph: bool,
) -> tuple[Tensor, Tensor]:
    """The weights of all losses, and those of this process, as the mean over processes has them."""
    [output] = step.objectives.outputs
    union = Union(meeting, group, step.objectives)
    collected = Collected(step.objectives, output.device, jacobian.memory)

    def compute() -> Tensor:
        jacobian.add_to(collected, retain_graph=retain_graph)
        return union.gramian(collected)

    source = GramianSource(
        union.objectives.rows,
        jacobian.graph.precision,
        output.device,
        compute,
        losses=union.values(output),
    )
    shape = None if output.ndim == 1 else union.shape
    weights = weights_of_first(meeting, weights_of(weighting, source, shape), output.device)
    return weights, union.own(weights).to(output.device, torch.float64) * meeting.size
