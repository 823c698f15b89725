"""Steps of one process and of several, and samples that lie on several or in two batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from jdcore._fields import check_grads, write_grads
from jdcore._modes import plain_modes
from jdcore.aggregation import as_weighting
from jdcore.aggregation._nested_state import state_kept
from jdcore.autogram._step import Step, source_of, weights_of
from jdcore.distributed._exchange import Collected, Union, forms_of
from jdcore.distributed._holders import Holders, find_holders
from jdcore.distributed._meeting import Group, Meeting, Stage
from jdcore.distributed._replicas import check_replicas
from jdcore.distributed._replicated import weights_of_first
from jdcore.distributed._sharding import Gathered
from jdcore.errors import ParameterError
from jdcore.graph import Accumulator, Dense, Jacobian, Share, reach
from jdcore.graph._cancelling import multiplied
from jdcore.linalg._gramian import sum_cross_gramians
from jdcore.validators import check_flag


def take_step(
    make_step: Callable[[], Step],
    weighting: Callable[[Tensor], Tensor],
    tensors: Sequence[Tensor],
    group: Group | None,
    *,
    named: bool,
    retain_graph: bool,
    second_pass: bool,
    per_process: bool,
) -> Tensor:
    """
    Weigh losses and write the weighted gradients, with all processes that hold the tensors.

    :param make_step: Checks and gives what there is to do with the losses of this process.
    :param weighting: A weighting, or the aggregator of one.
    :param tensors: Those that the Jacobian is with respect to.
    :param group: The processes, if the user says which.
    :param named: Whether the user named the tensors.
    :param per_process: Whether each process weighs its own samples alone.
    :returns: The weights: of the losses of all processes, or of those of this one.
    """
    # Before anything is computed: an aggregator taken for a weighting would give other numbers
    # without a word.
    chosen = as_weighting(weighting)
    check_flag(retain_graph, "retain_graph")
    check_flag(second_pass, "second_pass")
    check_flag(per_process, "per_process")
    holders = find_holders(tensors, group, named=named)
    if holders is None:
        return make_step().backward(chosen, retain_graph=retain_graph, second_pass=second_pass)
    return _together(make_step, holders, chosen, retain_graph, second_pass, per_process)


def _together(
    make_step: Callable[[], Step],
    holders: Holders,
    weighting: Callable[[Tensor], Tensor],
    retain_graph: bool,
    second_pass: bool,
    per_process: bool,
) -> Tensor:
    """
    Weigh the samples of all processes, and write the same gradients on all.

    :raises ParameterError: If what the processes have does not fit together.
    :raises PeerError: If another process could not make the step.
    """
    # The modes from here on, as parameters are gathered before the losses are seen.
    with (
        plain_modes(holders.tensors),
        state_kept(weighting),
        holders.meeting() as meeting,
        holders.gathered(meeting),
    ):
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
        with step.opened(together=True) as jacobian:
            known = holders.agreed(meeting, jacobian.changed, step.parameter)
            shard = Gathered().shard
            written = map(shard, [*jacobian.changed, *jacobian.graph.retained])
            check_grads(t for t in written if t.grad is None or not t.grad.is_sparse)
            if per_process:
                [output] = step.objectives.outputs
                compute = partial(jacobian.gramian, keep=True, retain_graph=retain_graph)
                source = source_of(jacobian, output.detach().reshape(-1), compute)
                weights = weights_of(weighting, source, step.shape)
                own, rows = weights.to(output.device).reshape(-1), dict[Tensor, Share]()
            else:
                weights, own, rows = _all_weights(
                    step, jacobian, weighting, meeting, holders.group, retain_graph
                )
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
        answer = step.for_user(weights)  # before anything is written, as it takes memory
    write_grads(means | local)
    return answer


def _all_weights(
    step: Step,
    jacobian: Jacobian,
    weighting: Callable[[Tensor], Tensor],
    meeting: Meeting,
    group: Group,
    retain_graph: bool,
) -> tuple[Tensor, Tensor, dict[Tensor, Share]]:
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
    rows: dict[Tensor, Share] = {}
    dimension = step.objectives.batch_dim or 0

    def compute() -> Tensor:
        if plain:
            found, samples = jacobian.plain_rows(), step.objectives.samples
            tasks = math.prod(output.shape[:dimension] + output.shape[dimension + 1 :])
            for i, tensor in enumerate(step.wanted):
                if tensor in found:
                    of_tensor = found[tensor].view(tasks, samples, tensor.numel())
                    collected.shares.append(Dense(of_tensor, tensor.shape))
                    collected.names.append(i)
                    if samples:
                        rows[tensor] = collected.shares[-1]
        else:
            collect(step, jacobian, collected, retain_graph=retain_graph)
        return union.gramian(collected, jacobian.graph.form.precision)

    source = source_of(jacobian, union.values(output), compute)
    shape = None if step.shape is None else union.shape
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


# -- two batches -----------------------------------------------------------------------------------


def crossed(one: Step, other: Step) -> Tensor:
    """
    The inner products of the rows of two Jacobians, float64 [m, l].

    The shares of both batches are brought together as those of several processes are: the Gramian
    of all their samples has the products of one with the other.

    :param one: Of a vector of m losses, with samples.
    :param other: Of a vector of l losses, with samples, of the same parameters.
    """
    with one.opened() as of_one, other.opened() as of_other:
        return _crossed((one, other), (of_one, of_other))


def _crossed(steps: Sequence[Step], jacobians: Sequence[Jacobian]) -> Tensor:
    alone = [j.objectives.samples < 2 or j.goes_one_by_one() for j in jacobians]
    # The shares of one sample alone are others than those of several.
    if any(alone):
        return _by_rows(jacobians)
    device, memory = steps[0].objectives.outputs[0].device, jacobians[0].memory
    found = [Collected(step.objectives, device, memory) for step in steps]
    for step, jacobian, collected in zip(steps, jacobians, found, strict=True):
        collect(step, jacobian, collected, retain_graph=True)
    # Batches may take different branches of a model; shares are paired by their order, which then
    # means nothing.
    if _kinds(found[0]) != _kinds(found[1]):
        return _by_rows(jacobians)
    m, rows = found[0].rows, found[0].rows + found[1].rows
    shares = [_joined(*pair) for pair in zip(found[0].shares, found[1].shares, strict=True)]

    def added_up() -> tuple[Tensor, bool]:
        total = Accumulator(rows, device, False, memory)
        with torch.no_grad():
            for share in shares:
                total.add_share(share)
            return total.result()

    gramian, _ = multiplied(rows, jacobians[0].graph.form.precision, added_up)
    # Of the Gramian of all samples, the products of one batch with the other.
    return gramian[:m, m:]


def _kinds(collected: Collected) -> list[object]:
    """What the shares of two batches have to have in common."""
    kinds = [(type(share), share.shape, share.setting) for share in collected.shares]
    return [*zip(kinds, collected.names, strict=True)]


def _joined(share: Share, other: Share) -> Share:
    """The share of the samples of both batches."""
    ours, theirs = share.factors_of_samples(), other.factors_of_samples()
    if ours is None or theirs is None or forms_of(ours) != forms_of(theirs):
        # Such as sentences of different lengths, which cannot lie side by side.
        rows = torch.cat([share.flat_rows(), other.flat_rows()], 1)
        return Dense(rows, rows.shape[2:])
    pairs = zip(ours, theirs, strict=True)
    return share.of([torch.cat([a, b], dimension) for (a, dimension), (b, _) in pairs])


def _by_rows(jacobians: Sequence[Jacobian]) -> Tensor:
    """By one backward pass for each loss."""
    one, other = (jacobian.plain_rows() for jacobian in jacobians)
    both = [tensor for tensor in one if tensor in other]
    if both:
        return sum_cross_gramians([one[t] for t in both], [other[t] for t in both])
    sizes = [jacobian.objectives.rows for jacobian in jacobians]
    return jacobians[0].objectives.outputs[0].new_zeros(sizes, dtype=torch.float64)
