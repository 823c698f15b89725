"""The computation of a step whose samples lie on several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jdcore._fields import check_grads, write_grads
from jdcore.autogram._step import Step, source_of, weights_of
from jdcore.distributed._exchange import Collected, Union
from jdcore.distributed._gathering import without_hooks
from jdcore.distributed._holders import Holders
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._replicas import check_replicas
from jdcore.distributed._replicated import weights_of_first
from jdcore.distributed._sharding import Gathered
from jdcore.distributed._step import state_kept
from jdcore.errors import ParameterError
from jdcore.graph import Dense, Jacobian, reach


def backward_together(
    make_step: Callable[[], Step],
    holders: Holders,
    weighting: Callable[[Tensor], Tensor],
    *,
    retain_graph: bool,
    second_pass: bool,
    per_process: bool,
) -> Tensor:
    """
    Weigh the samples of all processes, and write the same gradients on all.

    :param make_step: Checks and gives what there is to do with the losses of this process.
    :param holders: The processes.
    :param per_process: Whether each process weighs its own samples alone.
    :returns: The weights: of all losses, or of those of this process.
    :raises ParameterError: If what the processes have does not fit together.
    :raises PeerError: If another process could not make the step.
    """
    with state_kept(weighting), holders.meeting() as meeting, holders.gathered(meeting):
        # Inside of the meeting, so that an error in the arguments of one process is told to the
        # others.
        step = make_step()
        if second_pass:
            raise ParameterError(
                "second_pass",
                "False where the samples lie on several processes",
                True,
                "What the first pass found is kept there; memory_budget bounds temporaries.",
            )
        if step.objectives.batch_dim is None:
            raise ParameterError(
                "batch_dim",
                "given where the samples lie on several processes",
                None,
                "For losses of whole batches: gramian_backward, or backward and jac_to_grad.",
            )
        check_replicas(step.wanted, [reach(step.objectives.outputs)], step.parameter)
        jacobian = step.jacobian(together=True)
        changed = jacobian.graph.leaves if step.all_leaves else jacobian.graph.targets
        known = holders.agreed(meeting, changed.values(), step.parameter)
        shard = Gathered().shard
        written = map(shard, [*changed.values(), *jacobian.graph.retained])
        check_grads(t for t in written if t.grad is None or not t.grad.is_sparse)
        weigh = _own_weights if per_process else _all_weights
        weights, own, rows = weigh(step, jacobian, weighting, meeting, holders.group, retain_graph)
        if jacobian.roots is not None:
            gradients = jacobian.weighted(own, retain_graph=retain_graph)
        else:
            gradients = jacobian.differentiated(own, retain_graph=retain_graph)
        # Rows of single passes are kept by parameter, beside the Jacobian, which has no share of
        # them.
        for tensor, share in rows.items():
            gradients[tensor] = share.weighted(step.objectives.by_task(own)).to(tensor.dtype)
        found = {shard(tensor): gradient for tensor, gradient in gradients.items()}
        means = holders.means(meeting, known, found)
        # What is no parameter, such as an input that requires grad, belongs to this process, and
        # weights of all samples are those of a mean over the processes.
        parts = 1 if per_process else meeting.size
        local = {t: gradient / parts for t, gradient in found.items() if t not in means}
    write_grads(means | local)
    return weights


def _own_weights(
    step: Step,
    jacobian: Jacobian,
    weighting: Callable[[Tensor], Tensor],
    meeting: Meeting,
    group: Group,
    retain_graph: bool,
) -> tuple[Tensor, Tensor, Mapping[Tensor, Dense]]:
    # Nothing is exchanged before the gradients: the arguments are those of the other way to weigh.
    del meeting, group
    [output] = step.objectives.outputs
    source = source_of(
        jacobian,
        output.detach().reshape(-1),
        lambda: jacobian.gramian(keep=True, retain_graph=retain_graph),
    )
    weights = weights_of(weighting, source, None if output.ndim == 1 else output.shape)
    return weights, weights.to(output.device).reshape(-1), {}


def _all_weights(
    step: Step,
    jacobian: Jacobian,
    weighting: Callable[[Tensor], Tensor],
    meeting: Meeting,
    group: Group,
    retain_graph: bool,
) -> tuple[Tensor, Tensor, Mapping[Tensor, Dense]]:
    """
    The weights of all losses, and those of this process, as the mean over processes has them.

    Also the rows of this process by parameter, where each loss had a backward pass of its own.
    """
    [output] = step.objectives.outputs
    union = Union(meeting, group, step.objectives)
    collected = Collected(step.objectives, output.device, jacobian.memory)
    # The shares of one sample alone are others than those of several; without any there are none.
    few = step.objectives.samples < 2 or jacobian.goes_one_by_one()
    plain = meeting.agree(Stage.SAMPLES, int(few)) != [0]
    rows: dict[Tensor, Dense] = {}

    def compute() -> Tensor:
        if plain:
            found = plain_shares(step, jacobian)
            collected.shares.extend(found.values())
            collected.names.extend(i for i, tensor in enumerate(step.wanted) if tensor in found)
            rows.update(found if step.objectives.samples else {})
        else:
            collect(step, jacobian, collected, retain_graph=retain_graph)
        return union.gramian(collected, jacobian.graph.form.precision)

    source = source_of(jacobian, union.values(output), compute)
    shape = None if output.ndim == 1 else union.shape
    weights = weights_of_first(meeting, weights_of(weighting, source, shape), output.device)
    # What is written is the mean over processes, but the update is a sum over the samples of all.
    return weights, union.own(weights).to(output.device, torch.float64) * meeting.size, rows


def collect(step: Step, jacobian: Jacobian, collected: Collected, *, retain_graph: bool) -> None:
    """Collect the shares of a Jacobian with samples, and what tells each from the others."""
    jacobian.add_to(collected, retain_graph=retain_graph)
    # Places, since processes have no other common name for their parameters: addresses and ids
    # differ.
    places = {tensor: i for i, tensor in enumerate(step.wanted)}
    assert jacobian.roots is not None  # it has just made them
    for roots in jacobian.roots.sources:
        ways = dict.fromkeys(map(jacobian.graph.way, roots))
        names = [(places[jacobian.graph.leaves[leaf]], way) for leaf, way in ways]
        collected.names.append(names)


def plain_shares(step: Step, jacobian: Jacobian) -> dict[Tensor, Dense]:
    """The rows of every parameter by backward passes of this process, zero for one not reached."""
    # Not above: autojac has functions of autogram, too.
    from jdcore.autojac.transform import Diagonalize, Init, Jac

    [output] = step.objectives.outputs
    reached = set(jacobian.graph.targets.values())
    targets = [tensor for tensor in step.wanted if tensor in reached]
    found: Mapping[Tensor, Tensor] = {t: t.new_zeros(0, t.numel()) for t in targets}
    if output.numel():
        graph = without_hooks(reach([output]))
        jac = Jac([output], targets, retain_graph=True, graph=graph)
        with jacobian.fields_unchanged():
            found = (Init([output]) >> Diagonalize([output]) >> jac)()
    samples, dimension = step.objectives.samples, step.objectives.batch_dim or 0
    tasks = math.prod(output.shape[:dimension] + output.shape[dimension + 1 :])
    shares = {}
    for target in targets:
        rows = found[target].reshape(*output.shape, target.numel()).movedim(dimension, -2)
        shares[target] = Dense(rows.reshape(tasks, samples, target.numel()), target.shape)
    return shares
