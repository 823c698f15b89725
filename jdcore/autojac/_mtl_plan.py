from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve, frozen
from torch import Tensor

from jdcore.autojac import _checks as checks
from jdcore.autojac._reentrant import is_reentrant, refuse_default
from jdcore.distributed._refusals import refuse_flat
from jdcore.distributed._replicas import check_replicas, check_trunk
from jdcore.distributed._sharding import Gathered
from jdcore.errors import ParameterError
from jdcore.graph import Reach, edge_of, reach, reach_behind
from jdcore.validators import describe_tensor


@frozen(eq=False)
class Plan:
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

    def in_shards(self) -> Plan:
        """The same, with parameters under FSDP2 in the form that optimizers know."""
        shards = Gathered().shards
        return evolve(self, shared=shards(self.shared), tasks=list(map(shards, self.tasks)))

    @property
    def private(self) -> list[Tensor]:
        return list(dict.fromkeys(parameter for task in self.tasks for parameter in task))

    @property
    def rows(self) -> list[Tensor]:
        return self.cut if self.rows_from_features else self.shared


def independent(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """
    The features that require grad.

    :raises ParameterError: If none does, or one is computed from another.
    """
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


def make_plan(
    losses: list[Tensor],
    cut: list[Tensor],
    shared_params: Iterable[Tensor] | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
) -> Plan:
    """
    Decide who gets what from the arguments of ``mtl_backward``.

    :param cut: The features that require grad.
    :raises ParameterError: If the parameters do not fit together.
    """
    trunk = reach(cut)
    reentrant = is_reentrant(trunk)
    if reentrant and shared_params is None:
        raise refuse_default("shared_params")
    heads = [reach([loss], stop=cut) for loss in losses]
    for graph in (trunk, *heads):
        refuse_flat(graph.leaves, "shared_params")
    shared = _shared(trunk, shared_params)
    tasks = _tasks(losses, trunk, heads, tasks_params)
    _check_overlap(shared, tasks)
    if shared_params is not None and not reentrant:
        shared = [p for p in shared if any(graph.reaches(p) for graph in (trunk, *heads))]
    check_trunk(trunk, heads, "features")
    private = [p for task in tasks for p in task]
    check_replicas([*shared, *private], (trunk, *heads), "shared_params")
    edges = {edge_of(parameter) for parameter in shared}
    past_features = any(head.reaches_any(edges) for head in heads)
    # The hooks of a feature would see its gradient twice: at the end of the heads, and again at the
    # start of the trunk.
    hooked = any(feature._backward_hooks for feature in cut)
    deep = any(trunk.reaches(p) for task in tasks for p in task)
    whole = past_features or hooked
    if whole or deep:
        heads = [reach([loss]) for loss in losses]
    return Plan(cut, shared, tasks, heads, bool(shared) and not whole, deep)


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
    gathered = Gathered()
    return [gathered.leaf(p) for p in checks.tensor_list(given, name)] if len(given) else []


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
