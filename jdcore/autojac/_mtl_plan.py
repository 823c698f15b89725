from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve, frozen
from torch import Tensor
from torch.autograd.graph import Node

from jdcore._differentiable import check_accumulates, check_differentiable, trainable
from jdcore.autojac import _checks as checks
from jdcore.autojac._hidden import default_error, hides, is_reentrant, may_reach
from jdcore.autojac._vmap import is_small
from jdcore.distributed._gathering import has_hooks, without_hooks
from jdcore.distributed._refusals import refuse_flat
from jdcore.distributed._replicas import check_replicas, check_trunk
from jdcore.distributed._sharding import Gathered, still_trainable
from jdcore.errors import ParameterError, ParameterTypeError, UnservedGraphError
from jdcore.graph import Reach, edge_of, reach
from jdcore.graph._walk import united
from jdcore.validators import describe_tensor, items, tensor_list

# Up to so many rows of a small trunk take as long one by one as at once, by vmap.
_FEW_TASKS = 8


@frozen(eq=False)
class Plan:
    """
    Which parameters get a ``.jac``, which get a ``.grad``, and from where.

    :param cut: Features that require grad, where the heads end.
    :param trunk: What lies behind the features, these included.
    :param shared: Parameters that get a ``.jac``.
    :param tasks: Per task, the parameters that get a ``.grad``.
    :param private: All of these, each once.
    :param heads: Per task, what lies between the loss and the features.
    :param whole: Whether each task is differentiated from end to end. Otherwise its gradients end
        at the features, from which the rows start.
    :param graph: What the gradients of the tasks pass through.
    :param given: All parameters that were named, also those that get nothing.
    """

    cut: list[Tensor]
    trunk: Reach
    shared: list[Tensor]
    tasks: list[list[Tensor]]
    private: list[Tensor]
    heads: list[Reach]
    whole: bool
    graph: Reach
    given: list[Tensor]

    @property
    def rows_from_features(self) -> bool:
        """Whether the rows start from the features."""
        return bool(self.shared) and not self.whole

    @property
    def is_short(self) -> bool:
        """Whether passes from end to end take no longer than those for the heads and the trunk."""
        return (
            self.rows_from_features
            # Of several, one that counts for nothing in a loss may have an infinite derivative. It
            # is left out where rows start from the features; a whole pass would give NaN.
            and len(self.cut) == 1
            and len(self.heads) <= _FEW_TASKS
            and all(parameter.is_cpu for parameter in self.shared)
            and is_small(self.trunk, self.shared)
        )

    def from_end_to_end(self) -> Plan:
        """The same with one pass for each task, through its head and the trunk."""
        return evolve(self, whole=True, graph=united([self.graph, self.trunk]))

    @property
    def rows(self) -> list[Tensor]:
        """What the passes of the tasks make rows of."""
        return self.cut if self.rows_from_features else self.shared

    @property
    def retained(self) -> list[bool] | None:
        """Per task, whether a later one needs its graph; None if all go through the trunk."""
        if self.whole:
            return None
        # To retain a graph longer than needed keeps its activations alive during the passes to
        # come.
        retained, later = [], set[Node]()
        for head in reversed(self.heads):
            retained.append(not later.isdisjoint(head.nodes))
            later.update(head.nodes)
        return retained[::-1]

    @property
    def uses(self) -> list[list[int]]:
        """Per task, the features its loss depends on, by position, as far as the graph tells."""
        edges = [edge_of(feature) for feature in self.cut]
        return [[i for i, edge in enumerate(edges) if edge in head.stops] for head in self.heads]


def find_trunk(features: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], Reach]:
    """
    The features that require grad, and what lies behind them.

    :raises ParameterError: If none does, or one is computed from another.
    """
    given = tensor_list(features, "features")
    checks.check_outputs(given, "features")
    cut = [feature for feature in given if feature.requires_grad]
    trunk = without_hooks(reach(cut))
    for i, feature in enumerate(given):
        # Each counts as a use of its own.
        if feature.requires_grad and trunk.edges[edge_of(feature)] > 1:
            raise ParameterError(
                "features",
                "computed independently of one another",
                f"features[{i}], from which another one is computed",
                "Give only those that the heads read last, or use backward.",
            )
    return cut, trunk


def make_plan(
    losses: list[Tensor],
    cut: list[Tensor],
    trunk: Reach,
    shared_params: Iterable[Tensor] | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
) -> Plan:
    """
    Decide from the arguments of ``mtl_backward`` which parameters get what.

    :param cut: The features that require grad.
    :param trunk: What lies behind them.
    :raises ParameterError: If the parameters do not fit together.
    """
    named_shared = None if shared_params is None else _named(shared_params, "shared_params")
    named_tasks = None if tasks_params is None else _named_tasks(tasks_params, len(losses))
    given = [*(named_shared or ()), *(p for task in named_tasks or () for p in task)]
    # From each loss to the features only: walks that go on through the trunk would take m times its
    # size.
    heads = [without_hooks(reach([loss], stop=cut)) for loss in losses]
    front = united(heads)
    if is_reentrant(trunk) and shared_params is None:
        raise default_error("shared_params")
    if is_reentrant(front) and tasks_params is None:
        raise default_error("tasks_params")
    check_trunk(trunk, front, "features")
    if named_shared is None or named_tasks is None:
        _refuse_ties(trunk, front, "shared_params" if named_shared is None else "tasks_params")
    refuse_flat([*trunk.leaves, *front.leaves], "shared_params")
    shared = _shared(trunk, front, named_shared)
    tasks = _tasks(losses, trunk, heads, named_tasks)
    if given:  # by default, a task has what is not behind the features
        _check_overlap(shared, tasks)
    private = list(dict.fromkeys([parameter for task in tasks for parameter in task]))
    check_replicas([*shared, *private], (trunk, front), "shared_params")
    # Where gradients cannot be had from the features, or at them: a shared parameter acts past the
    # features; a parameter that is named for a task lies in the trunk; a hook of a feature, or its
    # `.grad` if it retains that, would see its gradient twice, at the end of the heads and again at
    # the start of the trunk; a function hides parameters, so that only whole passes serve.
    whole = (
        front.reaches_any(shared)
        or trunk.reaches_any(private)
        or any(has_hooks(feature) or feature.retains_grad for feature in cut)
        or hides(front, [*shared, *private])
        or (
            named_tasks is not None
            and not all(trunk.reaches(p) or front.reaches(p) for p in private)
        )
    )
    # Walked as one: what heads and the trunk use in common is counted right.
    graph = without_hooks(reach(losses)) if whole else front
    return Plan(cut, trunk, shared, tasks, private, heads, whole, graph, given)


def _refuse_ties(trunk: Reach, front: Reach, parameter: str) -> None:
    """
    Refuse functions that give features and, past them, what losses depend on.

    Nobody sees inside: of a compiled model that returns features and the outputs of its heads, all
    parameters would count as shared.
    """
    functions = set(trunk.functions)
    # What comes from an output that features come from, too, is shared in truth.
    ties = [
        node.name()
        for node, number in (front.edges if functions else ())
        if node in functions and (node, number) not in trunk.edges
    ]
    if ties:
        raise UnservedGraphError(
            f"{ties[0]} (a compiled region, say)",
            "it gives features and, besides them, what losses depend on, so that all parameters "
            "behind it would count as shared",
            "Give shared_params and tasks_params, or all of its outputs as features, or compile "
            "the trunk and the heads apart.",
            parameter,
            "given where the graph does not show which parameters are shared",
        )


def _shared(trunk: Reach, front: Reach, named: list[Tensor] | None) -> list[Tensor]:
    if named is None:
        check_differentiable(trunk.leaves, "shared_params")
        return still_trainable(trunk.leaves)
    return [p for p in named if may_reach(trunk, [p]) or may_reach(front, [p])]


def _tasks(
    losses: list[Tensor],
    trunk: Reach,
    heads: list[Reach],
    named: list[list[Tensor]] | None,
) -> list[list[Tensor]]:
    if named is None:
        # A parameter behind the features is shared, also if a head reaches it by another way.
        behind = trunk.leaf_ids
        trainable = set(map(id, still_trainable(leaf for head in heads for leaf in head.leaves)))
        wanted = trainable - behind
        return [[leaf for leaf in head.leaves if id(leaf) in wanted] for head in heads]
    tasks = []
    for loss, head, params in zip(losses, heads, named, strict=True):
        found = set(may_reach(head, params))
        if may_reach(trunk, params):
            # Only then is it worth while to walk through the trunk again.
            found.update(may_reach(reach([loss]), params))
        tasks.append([parameter for parameter in params if parameter in found])
    return tasks


def _named_tasks(tasks_params: Sequence[Iterable[Tensor]], m: int) -> list[list[Tensor]]:
    given, expected = items(tasks_params), f"{m} groups of parameters, one per task"
    if given is None:
        raise ParameterTypeError("tasks_params", expected, describe_tensor(tasks_params))
    if len(given) != m:
        raise ParameterError("tasks_params", expected, len(given))
    return [_named(group, f"tasks_params[{i}]") for i, group in enumerate(given)]


def _named(params: Iterable[Tensor], parameter: str) -> list[Tensor]:
    """The trainable ones among parameters, possibly none."""
    gathered = Gathered()
    tensors = [gathered.leaf(t) for t in tensor_list(params, parameter, least=0)]
    found = trainable(tensors, parameter)
    check_accumulates(found, parameter)
    return found


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
