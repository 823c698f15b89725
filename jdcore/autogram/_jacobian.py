from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._call import LayerCall, check_batch, widened
from jdcore.autogram._passes import Objectives, capture, gradients
from jdcore.autogram._plan import Plan
from jdcore.autogram._probe import Probe, apart, probe_weights
from jdcore.autogram._scratch import Scratch
from jdcore.autogram._survey import Site, Survey, survey
from jdcore.autogram._validation import refuse_impossible
from jdcore.autogram.blocks import Block, Gradients, RowsBlock, combined
from jdcore.autogram.rules.direct import block_of_use, supported
from jdcore.autogram.rules.generic import rows_of_call, rows_of_losses
from jdcore.errors import ParameterError

_Place = tuple[Node, int]
"""A node of the graph and one of its outputs: where gradients are captured."""


class Jacobian:
    """
    The Jacobian of some losses, as blocks of columns.

    :param objectives: The losses.
    :param plan: Which rule serves what.
    :param key: Under which the graph holds the records.
    :param scratch: Reused memory.
    :param probe: What is known of graphs of this kind.
    :raises ParameterError: If it cannot be right.
    """

    def __init__(
        self, objectives: Objectives, plan: Plan, key: object, scratch: Scratch, probe: Probe
    ) -> None:
        self._objectives, self._plan = objectives, plan
        self._scratch, self._probe = scratch, probe
        self._found: Survey = survey(objectives.output, plan, key)
        self._pinned: dict[Parameter, None] = {}
        if objectives.batch_dim is None:
            self._pin()
        refuse_impossible(self._found, plan, objectives.batch_dim)
        self._blocks: list[Block] = []

    # -- which parameters are served how -----------------------------------------------------------

    def _pin(self) -> None:
        """Without samples, ordinary gradients are rows of J: only a cheaper closed form is used."""
        found, K = self._found, self._objectives.tasks
        calls: dict[Parameter, int] = {}
        for site in found.sites.values():
            for parameter in site.reached:
                calls[parameter] = calls.get(parameter, 0) + 1
        elsewhere = {*found.stray, *found.uses}
        for record, site in list(found.sites.items()):
            alone = all(calls[p] == 1 and p not in elsewhere for p in site.reached)
            beats_rows = getattr(record.served.rule, "beats_rows", None)
            if not (
                alone
                and beats_rows is not None
                and beats_rows(record.served.module, record.args, record.output_shape, K)
            ):
                self._pinned.update(dict.fromkeys(site.reached))
                del found.sites[record]
        self._pinned.update(dict.fromkeys(elsewhere))
        found.uses.clear()
        found.stray.clear()

    # -- the Gramian -------------------------------------------------------------------------------

    def gramian(self, keep: bool, retain_graph: bool) -> Tensor:
        """
        The Gramian of the flattened losses, float64 [m, m].

        :param keep: Whether :meth:`weighted` will be called.
        :param retain_graph: Whether the graph is needed afterwards.
        """
        output = self._objectives.output
        m = output.numel()
        gramian = Accumulator(m, output.device, keep, self._scratch)
        if m == 0:
            return gramian.total
        with torch.autocast(output.device.type, enabled=False):
            graph_needed = retain_graph or bool(self._found.uses)
            graph_needed |= keep and bool(self._found.leaves)
            captured = self._capture(graph_needed)
            with torch.no_grad():
                blocks = combined(list(self._make_blocks(captured)))
            self._blocks = blocks if keep else []
            captured.clear()
            with torch.no_grad():
                while blocks:
                    blocks[0].add_gramian(gramian)
                    blocks = blocks[1:]
        return self._objectives.gramian((gramian.total + gramian.total.T) / 2)

    def weighted(self, weights: Tensor, retain_graph: bool) -> dict[Tensor, Tensor]:
        """
        Gradients of the weighted losses, after :meth:`gramian` with ``keep``.

        :param weights: Shape of the losses.
        :returns: Gradient by leaf, for all leaves of the graph.
        """
        gradients_of = Gradients()
        leaves = list(self._found.leaves)
        by_task = self._objectives.by_task(weights)
        if leaves and weights.numel():
            found = gradients(self._objectives, leaves, by_task, retain_graph)
            for leaf, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    gradients_of.of[leaf] = gradient  # type: ignore[index]  # any leaf
        with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
            while self._blocks:
                block = self._blocks.pop()
                block.add_weighted(by_task.to(block.dtype), gradients_of)
        return gradients_of.of  # type: ignore[return-value]  # Parameters are Tensors

    # -- the backward passes -----------------------------------------------------------------------

    def _capture(self, graph_needed: bool) -> dict[_Place | Parameter, Tensor]:
        places = self._places()
        inputs: list[Tensor | GradientEdge] = [GradientEdge(*place) for place in places]
        inputs += list(self._pinned)
        kind = self._kind(places)
        probed = None
        checked = self._objectives.samples <= 1 or self._probe.mixed(kind) is not None
        if not checked:
            probed = self._probe_pass(inputs)
        grads = capture(self._objectives, inputs, self._found.operations, graph_needed)
        keys: list[_Place | Parameter] = [*places, *self._pinned]
        captured = {
            key: gradient for key, gradient in zip(keys, grads, strict=True) if gradient is not None
        }
        if probed is not None:
            self._compare(places, captured, probed, kind)
        return captured

    def _places(self) -> dict[_Place, str]:
        """Where gradients are needed, each with a label that is the same for every batch."""
        places: dict[_Place, str] = {}
        for uses in self._found.uses.values():
            for node, _ in uses:
                if supported(node):
                    places[node, 0] = f"operation {node.name()}"
        for record, site in self._found.sites.items():
            for edge in site.edges.values():
                label = record.served.name or type(record.served.module).__name__
                places[edge.node, edge.output_nr] = f"module {label}"
        return places

    def _kind(self, places: dict[_Place, str]) -> Hashable:
        records = self._found.sites
        training = tuple((id(r.served), r.training, len(r.output_shape)) for r in records)
        return training, tuple(places.values()), self._objectives.output.ndim

    def _probe_pass(self, inputs: list[Tensor | GradientEdge]) -> list[Tensor | None]:
        output = self._objectives.output
        weights = probe_weights(self._objectives.samples).to(output)
        by_task = weights.expand(self._objectives.tasks, -1)
        return gradients(self._objectives, inputs, by_task, retain_graph=True) if inputs else []

    def _compare(
        self,
        places: dict[_Place, str],
        captured: dict[_Place | Parameter, Tensor],
        probed: list[Tensor | None],
        kind: Hashable,
    ) -> None:
        weights = probe_weights(self._objectives.samples)
        mixed = set()
        for (place, label), of_place in zip(places.items(), probed, strict=False):
            grads = captured.get(place)
            if grads is None or of_place is None or apart(grads.sum(0), of_place, weights):
                continue
            if label.startswith("module"):
                _refuse_mixing(label, grads.shape[1:], len(weights))
            mixed.add(label)
        self._probe.remember(kind, frozenset(mixed))
        self._mixed = mixed

    # -- the blocks --------------------------------------------------------------------------------

    def _make_blocks(self, captured: dict[_Place | Parameter, Tensor]) -> Iterator[Block]:
        B = self._objectives.samples
        for parameter in self._pinned:
            if parameter in captured:
                yield RowsBlock(parameter, widened(captured[parameter]).unsqueeze(1))
        yield from self._open_blocks(captured)
        for site in self._found.sites.values():
            served = site.record.served
            grads = {
                index: captured[edge.node, edge.output_nr]
                for index, edge in site.edges.items()
                if (edge.node, edge.output_nr) in captured
            }
            if served.rule is not None and grads and site.reached:
                yield from served.rule.blocks(_call(site, grads, B))

    def _open_blocks(self, captured: dict[_Place | Parameter, Tensor]) -> Iterator[Block]:
        """Blocks of the parameters without a closed form."""
        rows_of: dict[Site, list[Parameter]] = {}
        by_definition: list[Parameter] = []
        for parameter, uses in self._found.uses.items():
            blocks: list[Block] = []
            sites: list[Site] = []
            for site in dict.fromkeys(uses.values()):
                inside = [use for use, owner in uses.items() if owner is site]
                direct = [self._direct(parameter, use, captured) for use in inside]
                if all(block is not None for block in direct):
                    blocks += [block for block in direct if block is not None]
                elif site is None or site.leaky:
                    by_definition.append(parameter)
                    break
                else:
                    sites.append(site)
            else:
                yield from blocks
                for site in sites:
                    rows_of.setdefault(site, []).append(parameter)
        yield from self._rows(rows_of, by_definition, captured)

    def _direct(
        self, parameter: Parameter, use: tuple[Node, int], captured: dict[_Place | Parameter, Tensor]
    ) -> Block | None:
        node, operand = use
        grads = captured.get((node, 0))
        B = self._objectives.samples
        if grads is None or grads.ndim < 2 or grads.shape[1] % B or self._mixes(node):
            return None
        return block_of_use(parameter, node, operand, widened(grads), B)

    def _mixes(self, node: Node) -> bool:
        mixed = self._probe.mixed(self._kind(self._places())) or ()
        return f"operation {node.name()}" in mixed

    def _rows(
        self,
        rows_of: dict[Site, list[Parameter]],
        by_definition: list[Parameter],
        captured: dict[_Place | Parameter, Tensor],
    ) -> Iterator[Block]:
        for site in self._found.sites.values():
            # Rows by definition hold all uses, also those that a rule would have served.
            site.reached.difference_update(by_definition)
        for site, parameters in rows_of.items():
            grads = {
                index: captured[edge.node, edge.output_nr]
                for index, edge in site.edges.items()
                if (edge.node, edge.output_nr) in captured
            }
            if grads:
                yield from rows_of_call(site, parameters, grads, self._objectives.samples)
        if by_definition:
            yield from rows_of_losses(self._objectives, by_definition)


def _call(site: Site, grads: dict[int, Tensor], samples: int) -> LayerCall:
    record = site.record
    name = record.served.name or type(record.served.module).__name__
    for gradient in grads.values():
        check_batch(name, gradient.shape[1] if gradient.ndim > 1 else 1, samples)
    count = max(grads) + 1
    return LayerCall(
        module=record.served.module,
        args=torch.utils._pytree.tree_map(widened, record.args),
        kwargs=torch.utils._pytree.tree_map(widened, record.kwargs),
        training=record.training,
        batch_size=samples,
        output_grads=tuple(widened(grads.get(index)) for index in range(count)),
        reached=frozenset(site.reached),
    )


def _refuse_mixing(label: str, shape: torch.Size, samples: int) -> None:
    name = label.removeprefix("module ")
    if not shape or shape[0] % samples:
        check_batch(name, shape[0] if shape else 1, samples)
    raise ParameterError(
        "batch_dim",
        "given only if each loss depends on one sample, and layers have samples first",
        f"samples that mix at the output of `{name}`, of shape {list(shape)}",
        "Use batch_first=True, keep the order of samples when dimensions are folded, avoid "
        "statistics of the batch, or use batch_dim=None.",
    )
