from __future__ import annotations

from typing import Any

from attrs import define, field
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter

from jdcore.autogram._plan import Plan
from jdcore.autogram._recording import Record
from jdcore.autogram.rules._direct import REARRANGING, Parents
from jdcore.distributed._refusals import refuse_replicated, refuse_sharded
from jdcore.errors import ParameterError

_LEAF = "torch::autograd::AccumulateGrad"

Use = tuple[Node, int]
"""An operation of the graph, and as which of its operands it uses something."""


@define(eq=False)
class Site:
    """A recorded call that the losses depend on, and where its output gradients can be had."""

    record: Record
    edges: dict[int, GradientEdge] = field(factory=dict)
    reached: set[Parameter] = field(factory=set)
    gates: list[Any] = field(factory=list)
    leaky: bool = False
    """Whether gradients leave the call by other ways than its inputs."""


@define(eq=False)
class Survey:
    """What one walk over the graph found."""

    sites: dict[Record, Site] = field(factory=dict)
    uses: dict[Parameter, dict[Use, Site | None]] = field(factory=dict)
    """Of parameters without a closed form: the operations, and the recorded calls around them."""
    stray: dict[Parameter, None] = field(factory=dict)
    """Parameters with a closed form that are used where no recorded call covers them."""
    leaves: dict[Tensor, None] = field(factory=dict)
    """Everything else that a backward pass would reach."""
    parents: Parents = field(factory=dict)
    children: dict[Node, list[Node]] = field(factory=dict)
    """The graph itself, without the nodes that gather the gradients of leaves."""
    operations: set[str] = field(factory=set)
    batch_norms: list[Node] = field(factory=list)


def survey(output: Tensor, plan: Plan, key: object) -> Survey:
    """
    Walk the graph of the losses once.

    Every node is visited together with the recorded call inside of which it lies (None outside), so
    that a parameter is known to be used where its rule looks, or elsewhere.

    :raises ParameterError: If a part of the graph cannot be seen, or lies on several processes.
    """
    found = Survey()
    root: Any = output.grad_fn
    stack = [_enter(found, root, output.output_nr, None, key)]
    seen = set(stack)
    leaves: list[Tensor] = []
    while stack:
        node, owner = stack.pop()
        _check(found, node)
        children = found.children[node] = []
        for position, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            name = child.name()
            if name == _LEAF:
                gatherer: Any = child
                leaves.append(gatherer.variable)
                _leaf(found, plan, gatherer.variable, owner, (node, position))
                continue
            children.append(child)
            if name in REARRANGING:
                users = found.parents.setdefault(child, [])
                if (node, position, number) not in users:
                    users.append((node, position, number))
            visit = _enter(found, child, number, owner, key)
            if visit not in seen:
                seen.add(visit)
                stack.append(visit)
    refuse_sharded(leaves, "output")
    refuse_replicated(leaves, "output")
    return found


def _enter(
    found: Survey, node: Node, output: int, owner: Site | None, key: object
) -> tuple[Node, Site | None]:
    """The node with the call inside of which it lies, coming from a node inside of ``owner``."""
    marks: Any = node.metadata  # a property that torch annotates as a method
    for number, record, index in marks.get(key, ()):
        if number == output:
            if owner is not None and node not in owner.record.sources:
                owner.leaky = True
            site = found.sites.setdefault(record, Site(record))
            site.edges[index] = GradientEdge(node, output)
            return node, site
    if owner is None or node in owner.record.sources:
        return node, None
    if getattr(node, "key", None) is key:
        owner.gates.append(node)
        return node, None
    return node, owner


def _leaf(found: Survey, plan: Plan, variable: Any, owner: Site | None, use: Use) -> None:
    if owner is not None and variable in owner.record.served.covered:
        owner.reached.add(variable)
        if owner.record.served.rule is not None:
            return
        found.uses.setdefault(variable, {})[use] = owner
    elif variable not in plan.names:
        found.leaves[variable] = None
    elif variable in plan.open:
        found.uses.setdefault(variable, {}).setdefault(use, None)
    else:
        found.stray[variable] = None


def _check(found: Survey, node: Node) -> None:
    name = node.name()
    found.operations.add(name)
    if name == "CheckpointFunctionBackward":
        raise ParameterError(
            "output",
            "computed without reentrant checkpointing, whose inner layers cannot be seen",
            "a graph with a reentrant checkpoint",
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
        )
    if name == "_DDPSinkBackward":
        raise ParameterError(
            "output",
            "computed by a module on one device",
            "a graph of DistributedDataParallel",
            "Its gradients are reduced by hooks that the engine does not run.",
        )
    if "BatchNormBackward" in name:
        found.batch_norms.append(node)


def leads_to_parameter(node: Node, plan: Plan) -> bool:
    """Whether a gradient that passes this node reaches a parameter of the engine."""
    stack, seen = [node], {node}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is None or child in seen:
                continue
            if getattr(child, "variable", None) in plan.names:
                return True
            seen.add(child)
            stack.append(child)
    return False
