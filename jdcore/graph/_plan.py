from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Size, Tensor

from jdcore.errors import UnservedGraphError
from jdcore.graph._cost import outer_ghost_beats_rows
from jdcore.graph._graph import Form, Graph, Place, once_for_each_form
from jdcore.graph._hooks import look
from jdcore.graph._layout import Layout
from jdcore.graph._operations import (
    MATRIX_PRODUCTS,
    PARTS,
    REARRANGING,
    having,
    operation,
    sizes_decide,
)
from jdcore.graph._probe import Findings, Unshown, find_layouts
from jdcore.graph._saved import (
    Unreadable,
    device_of,
    has_unpack_hooks,
    plain_attributes,
    saved,
)
from jdcore.graph.rules import FOR_LAYERS, RULES, Rules

_STRAIGHT, _ALONG_ALL, _ALONG_FIRST = map(having, ("straight", "along-all", "along-first"))


@frozen
class Descent:
    """
    What a root is, if nothing but rearranging lies between it and a parameter.

    :param leaf: The node of the parameter.
    :param part: Of which part of it the root consists, None for the whole.
    :param turned: Whether it lies transposed there; None if that is not known.
    """

    leaf: int
    part: Place | None
    turned: bool | None


@frozen(eq=False)
class Spot:
    """
    What all graphs of one kind have in common about an operation of the frontier.

    :param name: Its name.
    :param layouts: Where the samples are in each of its results.
    :param roots: By their numbers among the operands, the roots.
    :param shapes: Likewise, their shapes.
    :param complex: Whether some of its results are.
    :param silent: Whether no loss depends on some of its results.
    :param may_join: Whether it adds a bias to a product, both of which are finished at once.
    :param alike: What it shares with those operations that one call of its rule may serve together
        with it, None if no other one may be.
    :param beside: Whether it is a product of what another one is a product of.
    """

    name: str
    layouts: list[Layout | None]
    roots: dict[int, Place]
    shapes: dict[int, Size]
    complex: bool
    silent: bool
    may_join: bool
    alike: Hashable
    beside: bool


@define(eq=False, slots=False)  # slots leave no room for cached properties
class Plan:
    """
    Where shares arise and how they reach the parameters, for all graphs of one kind.

    The **frontier** is made of the operands that belong to no sample of operations whose results
    keep the samples apart; such an operand is a **root**.

    :param form: The form of the graphs.
    :param layouts: Where the samples are.
    """

    form: Form
    layouts: dict[Place, Layout]
    frontier: dict[int, list[int]] = field(factory=dict)
    """By operation, which of its operands are roots."""
    alone: set[Place] = field(factory=set)
    """Roots with one use whose rows are orthogonal to those of all others: finished at once."""
    ends: dict[Place, Descent] = field(factory=dict)
    """Those of them that are a parameter, but for a transposition and copies."""
    groups: list[dict[Place, bool | None]] = field(factory=list)
    """Roots that make up one parameter, and whether it lies transposed there (None: unknown)."""
    derived: list[Place] = field(factory=list)
    """Roots whose rows must be pulled back."""
    pulled: list[int] = field(factory=list)
    """The parameters that these reach."""
    below: list[int] = field(factory=list)
    """The operations between roots and parameters, results before operands."""
    ordinary: list[Place] = field(factory=list)
    """Tensors whose ordinary gradients are the rows, without samples."""
    late: dict[int, int] = field(factory=dict)
    """Operations whose rules ask a site for all that they read, with the size of their results."""
    left: list[Place] = field(factory=list)
    """Parameters that no loss depends on, such as those of an expert that no sample goes to."""
    called: set[int] | None = None
    """Operations that are called after the pass; None before the first one."""

    @cached_property
    def places(self) -> list[Place]:
        """The results of the frontier that something is computed from."""
        return [place for place in self.form.used if place[0] in self.frontier]

    @cached_property
    def size(self) -> int:
        """How many entries the results of the frontier have."""
        return sum(result.shape.numel() for n in self.frontier for result in self.form.results[n])

    @cached_property
    def spots(self) -> dict[int, Spot]:
        """What is known of the operations of the frontier."""
        kinds = {node: self._kind(node) for node in self.frontier}
        often = {kind for kind, count in Counter(kinds.values()).items() if count > 1}
        return {n: self._spot(n, kind if kind in often else None) for n, kind in kinds.items()}

    @cached_property
    def some_alike(self) -> bool:
        """Whether one call of a rule may serve several operations."""
        return any(spot.alike is not None for spot in self.spots.values())

    def _spot(self, node: int, alike: Hashable) -> Spot:
        form = self.form
        # A weight comes before the bias that may join it.
        roots = {p: form.inputs[node][p] for p in reversed(self.frontier[node])}
        name, layouts = form.names[node], self.of_results(node)
        return Spot(
            name,
            layouts,
            roots,
            {p: form.result(root).shape for p, root in roots.items()},
            any(result.dtype.is_complex for result in form.results[node]),
            None in layouts,
            name == "AddmmBackward0" and {roots.get(0), roots.get(2)} <= self.alone,
            alike,
            self._products[self._product(node)] > 1,
        )

    @cached_property
    def _products(self) -> Counter[tuple[str, Place] | None]:
        """How many products of the frontier there are of each factor."""
        return Counter(filter(None, map(self._product, self.frontier)))

    def _product(self, node: int) -> tuple[str, Place] | None:
        """What an operation is a product of, if it is one and that is differentiated."""
        name = self.form.names[node]
        if name not in MATRIX_PRODUCTS:
            return None
        factor = self.form.inputs[node][MATRIX_PRODUCTS[name][0] - 1]
        return (name, factor) if factor[0] >= 0 else None

    def _kind(self, node: int) -> Hashable:
        """The form of an operation, if its operands are parameters that it has alone."""
        form, layout = self.form, self.layouts.get((node, 0))
        operands, dtype = self.frontier[node], form.result((node, 0)).dtype
        ends = [self.ends.get(form.inputs[node][p]) for p in operands]
        if form.names[node] not in FOR_LAYERS or dtype.is_complex or None in ends:
            return None
        if layout is None or layout.index is not None:
            return None
        shapes = [form.result(form.inputs[node][p]).shape for p in operands]
        if not all(map(Size.numel, shapes)):
            return None  # of nothing, there is no size to cut by
        turned = [end.turned for end in ends if end is not None]
        samples = layout.dim, layout.samples, layout.after
        sizes = form.described[node], *samples, *operands, *shapes, *turned
        return form.names[node], *sizes

    def of_results(self, node: int) -> list[Layout | None]:
        """Where the samples are in each result of an operation."""
        return [self.layouts.get((node, number)) for number in range(len(self.form.results[node]))]

    def finish_at_once(self, root: Place, descent: Descent) -> None:
        """
        Say that a root has one use, and rows orthogonal to those of all others.

        :param descent: What it is.
        """
        self.alone.add(root)
        if descent.part is None and descent.turned is not None:
            self.ends[root] = descent


# -- with samples ----------------------------------------------------------------------------------


def plan_of_samples(graph: Graph, found: Findings, hooked: set[int]) -> Plan:
    """
    Find the frontier.

    :param found: Where the samples are.
    :param hooked: Parameters whose rows have to be written out, for their hooks.
    :raises UnservedGraphError: If samples mix in a way that can be named.
    """
    form = graph.form
    plan = Plan(form, found.layouts)
    apart = {node for node, _ in found.layouts}
    uses: dict[Place, int] = {}
    for node in reversed(form.upwards):
        if node not in apart or node not in form.leading:
            continue
        for operand, root in enumerate(form.inputs[node]):
            if root[0] not in form.leading or root[0] in apart:
                continue
            if root in found.reached or root[0] in form.rearranged:
                _refuse_mixing(graph, plan, node, operand)
                plan.frontier.setdefault(node, []).append(operand)
                uses[root] = uses.get(root, 0) + 1
    inside = apart | form.leaves
    plan.below = [n for n in reversed(form.upwards) if n in form.leading and n not in inside]
    _refuse_moved(graph, plan)
    _classify(plan, uses, apart, hooked)
    plan.late = {
        node: sum(result.shape.numel() for result in form.results[node])
        for node in plan.frontier
        if form.names[node] in RULES
    }
    return plan


def _refuse_moved(graph: Graph, plan: Plan) -> None:
    """Refuse roots that are not where the parameters are: their shares cannot be added up."""
    device = next(iter(graph.targets.values())).device
    for node, operands in plan.frontier.items():
        roots = [graph.form.inputs[node][operand] for operand in operands]
        if any(device_of(graph.nodes[n], number) != device for n, number in roots):
            raise UnservedGraphError(
                "a parameter that is used on another device",
                "its rows are not where those of others are",
                "Move the module instead, or use batch_dim=None.",
            ).at(graph.belonging_to(graph.nodes[node]))


def _classify(plan: Plan, uses: dict[Place, int], apart: set[int], hooked: set[int]) -> None:
    """Tell which roots are finished by themselves, which belong together, which are pulled back."""
    form = plan.form
    of_leaf: dict[int, list[tuple[Place, Descent]]] = {}
    for root in uses:
        descent = descend(form, root)
        if descent is None:
            plan.derived.append(root)
        else:
            of_leaf.setdefault(descent.leaf, []).append((root, descent))
    reached = {root[0] for root in plan.derived}
    for node in plan.below:
        if node in reached:
            reached.update(c for c, _ in form.inputs[node] if c >= 0 and c not in apart)
    # Hooks of a parameter have to see its whole rows, which only the way by rows gives.
    pulled = (reached & form.wanted) | hooked
    for leaf, roots in of_leaf.items():
        parts = {descent.part for _, descent in roots}
        # Parts of one splitting do not overlap, so that their rows are orthogonal. A part beside
        # the whole, or parts of two splittings, may overlap.
        whole = len(parts) == 1 or (None not in parts and len({p[0] for p in parts if p}) == 1)
        if leaf in pulled or not whole:
            pulled.add(leaf)
            plan.derived += [root for root, _ in roots]
            continue
        for part in parts:
            group = {root: descent for root, descent in roots if descent.part == part}
            # The Gramian of a sum of several uses is not the sum of their Gramians.
            if sum(uses[root] for root in group) == 1:
                [(root, descent)] = group.items()
                plan.finish_at_once(root, descent)
            else:
                plan.groups.append({root: descent.turned for root, descent in group.items()})
    plan.pulled = sorted(pulled)
    served = pulled | of_leaf.keys()
    plan.left = [place for place in form.targets if place[0] not in served]


def descend(form: Form, root: Place) -> Descent | None:
    """Which parameter a root is, rearranged or in part; None if it is computed from some."""
    node, number = root
    if form.result(root).dtype.is_complex:
        return None  # only its real part, or a turn of it, belongs to the parameter
    part: Place | None = None
    turned: bool | None = False
    while node not in form.leaves:
        kind = form.operations[node]
        if kind in PARTS and part is None:
            part, turned = (node, number), None
        elif kind not in REARRANGING:
            return None
        elif kind == "T":
            turned = None if turned is None else not turned
        elif kind not in _STRAIGHT:
            turned = None
        node, number = form.inputs[node][0]
        if node < 0:
            return None
    return Descent(node, part, turned) if node in form.wanted else None


def _goes_along(name: str, operand: int, layout: Layout) -> bool:
    """Whether an operand has its samples where the result of the operation has them."""
    if name in MATRIX_PRODUCTS:
        return operand == MATRIX_PRODUCTS[name][0] - 1 and layout.dim == 0
    kind = operation(name)
    return kind in _ALONG_ALL or (kind in _ALONG_FIRST and operand == 0)


def _refuse_mixing(graph: Graph, plan: Plan, node: int, operand: int) -> None:
    """
    Refuse an operation on the samples themselves, of which other losses depend on as well.

    Whatever else samples share (a table, prototypes, a routing) is served.
    """
    form = graph.form
    name, root = form.names[node], form.inputs[node][operand]
    layout = plan.layouts.get((node, 0))
    if layout is None or root[0] in form.rearranged or not _goes_along(name, operand, layout):
        return
    shape, whole = form.result(root).shape, form.result((node, 0)).shape
    # Something else than the samples themselves, as it has not as many entries along their
    # dimension.
    if len(shape) != len(whole) or shape[layout.dim] != whole[layout.dim]:
        return
    norm = "BatchNorm" in name
    raise UnservedGraphError(
        "a BatchNorm in training mode" if norm else f"samples that mix ({name})",
        "it makes losses of several samples depend on the same sample, against `batch_dim`",
        "Use batch_dim=None, whose losses may depend on all samples"
        + (", call .eval() on it, or use GroupNorm or InstanceNorm." if norm else "."),
        "batch_dim",
        "a dimension of samples that stay apart",
    ).at(graph.belonging_to(graph.nodes[node]))


# -- without samples -------------------------------------------------------------------------------


def plan_of_tasks(graph: Graph, tasks: int, hooked: set[int], alone: Container[int] = ()) -> Plan:
    """
    Without samples ordinary gradients are the rows, and come with the pass.

    Only where a matrix product spares forming them is its share taken at the product.

    :param tasks: Number of losses.
    :param hooked: Parameters whose hooks have to see the rows.
    :param alone: Leaves that one loss alone reaches, which have but one row.
    """
    form = graph.form
    plan, served = Plan(form, {}, called=set()), set[int]()
    for leaf, found in _uses(form).items():
        node, operand, descent = found[0]
        if len(found) > 1 or leaf in hooked or leaf in alone:
            continue
        if _is_cheap(graph, tasks, leaf, node, operand):
            plan.frontier[node] = [operand]
            # One sample that has all positions: the share is that of one row per task.
            plan.layouts[node, 0] = Layout(0, 1, form.result((node, 0)).shape[0])
            plan.finish_at_once(form.inputs[node][operand], descent)
            served.add(leaf)
    plan.ordinary = [place for place in form.targets if place[0] not in served]
    moved = form.rearranged - form.leaves
    plan.below = [n for n in reversed(form.upwards) if n in moved]
    return plan


@once_for_each_form
def _uses(form: Form) -> Mapping[int, Sequence[tuple[int, int, Descent]]]:
    """By leaf, the operations that it enters as it is or rearranged, and as which operands."""
    uses: dict[int, list[tuple[int, int, Descent]]] = {}
    inner = REARRANGING | PARTS
    for node, edges in enumerate(form.inputs):
        if form.operations[node] in inner:
            continue
        for operand, root in enumerate(edges):
            descent = descend(form, root) if root[0] in form.leading else None
            if descent is not None:
                uses.setdefault(descent.leaf, []).append((node, operand, descent))
    for start in form.starts:
        # A loss may be an entry of a parameter, or all of one.
        descent = descend(form, start)
        if descent is not None:
            uses.setdefault(descent.leaf, []).append((*start, descent))
    return uses


def _is_cheap(graph: Graph, tasks: int, leaf: int, node: int, operand: int) -> bool:
    form = graph.form
    expected, other = MATRIX_PRODUCTS.get(form.names[node], (None, ""))
    if operand != expected or 0 in (*form.result((node, 0)).shape, *form.result((leaf, 0)).shape):
        return False  # of nothing, gradients are zero
    if has_unpack_hooks(graph.nodes[node]):
        return False  # a checkpoint would compute it anew for each of its products
    root, number = form.inputs[node][operand]
    if root != leaf and device_of(graph.nodes[root], number) != graph.leaves[leaf].device:
        return False  # rows are added up where the parameters are
    try:
        if saved(graph.nodes[node], other).layout != torch.strided:
            return False
    except Unreadable:
        return False
    positions, outputs = form.result((node, 0)).shape
    inputs = form.result((leaf, 0)).shape.numel() // outputs
    return outer_ghost_beats_rows(tasks, positions, inputs, outputs)


# -- plans that are kept ---------------------------------------------------------------------------


class Plans:
    """
    Plans of kinds of graphs, for as long as nothing that they depend on can have changed.

    Kept are those of graphs in which names, shapes and integers alone decide where the samples are.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Plan] = OrderedDict()
        self._last: Plan | None = None  # the last one of them, as moving it takes long
        look()  # hooks that were made before are not on graphs to come

    def find(
        self, graph: Graph, output: Tensor, batch_dim: int, hooked: set[int], rules: Rules
    ) -> Plan:
        """The plan of a graph with samples."""
        # Shapes do not suffice: dimensions and offsets tell where entries go.
        integers = plain_attributes(graph.nodes)
        kind = graph.form, integers, batch_dim, tuple(sorted(hooked))
        plan = self._kept.get(kind)
        if plan is not None:
            if plan is not self._last:
                with suppress(KeyError):  # another thread may have let it go meanwhile
                    self._kept.move_to_end(kind)
                self._last = plan
            return plan
        found = find_layouts(graph, output, batch_dim)
        try:
            plan = plan_of_samples(graph, found, hooked)
        except UnservedGraphError:
            if found.spoilt:
                raise Unshown("NaN in the gradients hides where samples are") from None
            raise
        if not (found.sparse or found.spoilt) and _is_fixed(graph, plan, rules):
            self._kept[kind] = self._last = plan
            if len(self._kept) > _KINDS:
                # The one that was not used for longest: sequences of ever new lengths make ever new
                # kinds.
                self._kept.popitem(last=False)
        return plan


_KINDS = 256


def _is_fixed(graph: Graph, plan: Plan, rules: Rules) -> bool:
    """
    Whether all operations that samples pass through are steady, and the form shows what they need.

    Above samples that are apart again (a piece of what an index mixed), all of them decide.
    """
    form = graph.form
    passed = form.leading & form.above({node for node, _ in plan.layouts})

    def is_fixed(node: int) -> bool:
        name = form.names[node]
        dims = [layout.dim for layout in plan.of_results(node) if layout is not None]
        return rules.steady(name, graph.nodes[node]) and not sizes_decide(
            name, form.inputs[node], dims
        )

    return all(map(is_fixed, passed))
