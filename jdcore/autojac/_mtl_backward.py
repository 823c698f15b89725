from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen
from torch import Tensor

from jdcore.autojac import _checks as checks
from jdcore.autojac._leaves import Reach, reach, reach_behind
from jdcore.autojac.transform import (
    AccumulateGrad,
    AccumulateJac,
    Grad,
    Init,
    Jac,
    Keep,
    PerTask,
    Transform,
)
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor


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
    a loss past the features (a weight tied between trunk and head), the rows are those of the whole
    derivative, at the price of a backward pass through everything per task.

    A loss that does not require grad (the task is absent from the batch) gives a zero row. A shared
    parameter that none of the features depends on gets no ``.jac``. Nothing is written if the
    call fails.

    :param tensors: One loss per task. Those that are not scalars need ``grad_tensors``.
    :param features: The shared representation: what the trunk gives to the heads. None of them may
        be computed from another.
    :param grad_tensors: Initial gradients, one per tensor and of its shape. By default 1.
    :param tasks_params: The parameters of each task. Frozen ones are skipped. By default the leaves
        behind each loss that are not behind the features.
    :param shared_params: The parameters of the trunk. Frozen ones are skipped. By default the
        leaves behind the features.
    :param retain_graph: Whether to keep the graph for another differentiation.
    :param parallel_chunk_size: How many rows of the trunk to differentiate at once (by vmap), 1
        meaning one by one. None lets the library choose what is fast and works.
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
    losses = checks.tensor_list(tensors, "tensors")
    checks.check_outputs(losses, "tensors")
    initial = checks.initial_gradients(grad_tensors, losses, "grad_tensors")
    checks.check_flag(retain_graph, "retain_graph")
    checks.check_chunk_size(parallel_chunk_size)
    cut = _features(features)
    plan = _plan(losses, cut, shared_params, tasks_params)
    for parameter in plan.shared:
        checks.check_jac_field(parameter, len(losses))
    for parameter in plan.private:
        checks.check_grad_field(parameter)
    gradients = _task_gradients(plan, losses, initial, retain_graph)
    accumulate = AccumulateJac(plan.shared) | AccumulateGrad(plan.private)
    if plan.rows_from_features:
        jac = Jac(cut, plan.shared, retain_graph=retain_graph, chunk_size=parallel_chunk_size)
        graph = gradients >> (jac | Keep(plan.private)) >> accumulate
    else:
        graph = gradients >> accumulate
    graph()


@frozen(eq=False)
class _Plan:
    """
    Who gets what.

    :param cut: Features that require grad, where the heads end.
    :param shared: Parameters that get a ``.jac``.
    :param tasks: Per task, the parameters that get a ``.grad``.
    :param heads: Per task, what its gradient passes through.
    :param rows_from_features: Whether the rows start from the features. Otherwise each task is
        differentiated down to the shared parameters.
    :param deep: Whether the parameters of some task lie behind the features.
    """

    cut: list[Tensor]
    shared: list[Tensor]
    tasks: list[list[Tensor]]
    heads: list[Reach]
    rows_from_features: bool
    deep: bool

    @property
    def private(self) -> list[Tensor]:
        return list(dict.fromkeys(parameter for task in self.tasks for parameter in task))

    @property
    def rows(self) -> list[Tensor]:
        return self.cut if self.rows_from_features else self.shared


def _features(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    given = checks.tensor_list(features, "features")
    checks.check_outputs(given, "features")
    cut = [feature for feature in given if feature.requires_grad]
    behind = reach_behind(cut)
    for i, feature in enumerate(given):
        if feature.requires_grad and behind.reaches(feature):
            raise ParameterError(
                "features",
                "computed independently of one another",
                f"features[{i}], from which another one is computed",
                "Give only those that the heads read last, or use backward.",
            )
    return cut


def _plan(
    losses: list[Tensor],
    cut: list[Tensor],
    shared_params: Iterable[Tensor] | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
) -> _Plan:
    trunk = reach(cut)
    heads = [reach([loss], stop=cut) for loss in losses]
    shared = _shared(trunk, shared_params)
    tasks = _tasks(losses, trunk, heads, tasks_params)
    _check_overlap(shared, tasks)
    shared = [p for p in shared if trunk.reaches(p) or any(head.reaches(p) for head in heads)]
    past_features = any(head.reaches(p) for head in heads for p in shared)
    deep = any(trunk.reaches(p) for task in tasks for p in task)
    if past_features or deep:
        heads = [reach([loss]) for loss in losses]
    return _Plan(cut, shared, tasks, heads, bool(shared) and not past_features, deep)


def _shared(trunk: Reach, shared_params: Iterable[Tensor] | None) -> list[Tensor]:
    if shared_params is None:
        checks.check_real(trunk.leaves, "shared_params")
        return list(trunk.leaves)
    shared = checks.trainable(_possibly_none(shared_params, "shared_params"), "shared_params")
    checks.check_accumulates(shared, "shared_params")
    return shared


def _tasks(
    losses: list[Tensor],
    trunk: Reach,
    heads: list[Reach],
    tasks_params: Sequence[Iterable[Tensor]] | None,
) -> list[list[Tensor]]:
    if tasks_params is None:
        behind = set(trunk.leaves)
        return [[leaf for leaf in head.leaves if leaf not in behind] for head in heads]
    given = list(tasks_params)
    if len(given) != len(losses):
        raise ParameterError(
            "tasks_params", f"{len(losses)} groups of parameters, one per task", len(given)
        )
    tasks = []
    for i, (loss, group) in enumerate(zip(losses, given, strict=True)):
        name = f"tasks_params[{i}]"
        params = checks.trainable(_possibly_none(group, name), name)
        checks.check_accumulates(params, name)
        whole = reach([loss])
        tasks.append([parameter for parameter in params if whole.reaches(parameter)])
    return tasks


def _possibly_none(params: Iterable[Tensor], name: str) -> list[Tensor]:
    given = params if isinstance(params, Tensor) else list(params)
    return checks.tensor_list(given, name) if len(given) else []


def _check_overlap(shared: list[Tensor], tasks: list[list[Tensor]]) -> None:
    positions = {parameter: i for i, parameter in enumerate(shared)}
    for i, task in enumerate(tasks):
        for parameter in task:
            if parameter in positions:
                raise ParameterError(
                    f"tasks_params[{i}]",
                    "disjoint from shared_params",
                    f"{describe_tensor(parameter)} that is also shared_params"
                    f"[{positions[parameter]}]",
                    "A parameter gets either a .jac (shared) or a .grad (of its tasks).",
                )


def _task_gradients(
    plan: _Plan, losses: list[Tensor], initial: list[Tensor] | None, retain_graph: bool
) -> PerTask:
    retain = _retained(plan, retain_graph)
    tasks: list[Transform] = []
    for i, loss in enumerate(losses):
        targets = [*plan.tasks[i], *plan.rows]
        start = Init([loss], None if initial is None else [initial[i]])
        if loss.requires_grad and targets:
            tasks.append(start >> Grad([loss], targets, retain_graph=retain[i]))
        else:
            tasks.append(Keep([]))
    return PerTask(tasks, plan.rows)


def _retained(plan: _Plan, retain_graph: bool) -> list[bool]:
    """Whether the graph of each task must outlive its gradient: someone comes by again."""
    retained = []
    later = reach(plan.cut).nodes if plan.deep else set()
    for head in reversed(plan.heads):
        retained.append(retain_graph or not later.isdisjoint(head.nodes))
        later = later | head.nodes
    return retained[::-1]
