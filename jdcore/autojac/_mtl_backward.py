from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore._compilation import not_traced
from jdcore._fields import check_grads, check_jacs
from jdcore._modes import plain_modes
from jdcore.autojac import _checks as checks
from jdcore.autojac._initial import initial_gradients
from jdcore.autojac._mtl_plan import find_trunk, make_plan
from jdcore.autojac.transform import (
    AccumulateGrad,
    AccumulateJac,
    Chain,
    Init,
    Jac,
    Keep,
    PerTask,
    Transform,
)
from jdcore.autojac.transform._sharded import ShardedTasks
from jdcore.distributed._heads import check_can_wait, note_local_gradients
from jdcore.distributed._passes import is_spread, telling_holders
from jdcore.distributed._sharding import Gathered
from jdcore.graph._retained import put_back_on_failure
from jdcore.validators import tensor_list


@not_traced
def mtl_backward(
    tensors: Sequence[Tensor],
    /,
    features: Tensor | Sequence[Tensor],
    *,
    grad_tensors: Sequence[Tensor] | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """
    Backward pass of multi-task learning: gradients for the heads, a Jacobian for the trunk.

    The gradient of each task's loss is accumulated into the ``.grad`` of that task's parameters
    (a parameter of several tasks gets the sum), and the Jacobian of all the losses, one row per
    task, into the ``.jac`` of the shared parameters. The heads are differentiated only once, as far
    as the features; the rows of the trunk start from there. Where a shared parameter also acts on
    a loss past the features (a weight tied between trunk and head), a feature has hooks, or a
    head hides parameters, each task is differentiated from end to end instead, and the rows are
    those of the whole derivative.

    A loss that does not require grad (the task is absent from the batch) gives a zero row. A shared
    parameter that none of the features depends on gets no ``.jac``. Nothing is written if the
    call fails.

    :param tensors: One loss per task. Those that are not scalars need ``grad_tensors``.
    :param features: The shared representation: what the trunk gives to the heads. None of them may
        be computed from another.
    :param grad_tensors: Initial gradients, one per tensor and of its shape. By default 1.
    :param tasks_params: The parameters of each task. Frozen ones are skipped. By default the leaves
        behind each loss that are not behind the features. They must be given where functions of
        the heads hide them, as reentrant checkpoints do.
    :param shared_params: The parameters of the trunk. Frozen ones are skipped. By default the
        leaves behind the features. They must be given where functions of the trunk hide them, and
        so must those of the tasks where one function gives both features and what losses depend on
        besides them, as a compiled region that holds the heads does.
    :param retain_graph: Whether to keep the graph for another differentiation.
    :param parallel_chunk_size: How many rows of the trunk to differentiate at once (by vmap), 1
        meaning one by one. None lets the library choose what is fast and works, be it a pass for
        each task from end to end.
        Under ``fully_shard``, rows one by one take less memory: see docs/distributed.md.
    :raises ParameterError: If an argument does not fit; see its message.

    >>> import torch
    >>> from jdcore.autojac import mtl_backward
    >>> trunk = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> heads = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)]
    >>> features = trunk**2
    >>> losses = [heads[0] * features.sum(), heads[1] * features[0]]
    >>> mtl_backward(losses, features)
    >>> trunk.jac
    tensor([[4., 8.],
            [6., 0.]])
    >>> heads[0].grad, heads[1].grad
    (tensor(5.), tensor(1.))
    """
    losses = tensor_list(tensors, "tensors")
    with telling_holders(losses, shared_params):
        checks.check_call(losses, "tensors", retain_graph, parallel_chunk_size)
        initial = initial_gradients(grad_tensors, losses, "grad_tensors")
        cut, trunk = find_trunk(features)
        plan = make_plan(losses, cut, trunk, shared_params, tasks_params)
        shards = Gathered().shards
        shared, private = shards(plan.shared), shards(plan.private)
        # All fields that will be written, before the first pass: afterwards the graph may be gone.
        check_jacs(shared, len(losses))
        check_grads(private)
        spread = is_spread([*shared, *private])
        check_can_wait(private, spread=spread)
        if plan.is_short and parallel_chunk_size is None and not spread:
            plan = plan.from_end_to_end()
        parts: list[Transform] = [
            PerTask(
                losses,
                plan.rows,
                plan.tasks,
                retain_graph=retain_graph,
                retained=plan.retained,
                graph=plan.graph,
                watched=plan.given,
            )
        ]
        if plan.rows_from_features:
            jac = Jac(
                cut,
                plan.shared,
                retain_graph=retain_graph,
                chunk_size=parallel_chunk_size,
                graph=trunk,
                watched=plan.given,
                # Values tell more: a feature that counts for nothing. An accelerator would be
                # waited for.
                uses=None if all(feature.is_cpu for feature in cut) else plan.uses,
            )
            # The rows go on through the trunk; the gradients of the heads are done and pass by it.
            parts.append(jac | Keep(plan.private))
        if spread:
            together = ShardedTasks(
                losses,
                shared,
                list(map(shards, plan.tasks)),
                Chain(parts),
                (plan.shared, plan.private),
                retain_graph=retain_graph,
                chunk_size=parallel_chunk_size,
            )
            parts = [together]
        # Both writers check all their fields before they write the first one, and what they write
        # was checked above: neither fails after the other has written.
        end = AccumulateJac(shared) | AccumulateGrad(private)
        graph = Chain([Init(losses, initial), *parts, end])
        modes = plain_modes([*losses, *shared, *private])
        with modes, put_back_on_failure(plan.graph, trunk):
            graph()
    if not spread:
        note_local_gradients(private)
