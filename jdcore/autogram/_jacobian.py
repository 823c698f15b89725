from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._call import LayerCall, check_batch, widened
from jdcore.autogram._open import Layouts, OpenParameters, grads_of
from jdcore.autogram._passes import Objectives, capture, gradients
from jdcore.autogram._plan import Plan
from jdcore.autogram._probe import Probe
from jdcore.autogram._samples import findings_of, kind_of, probe_pass
from jdcore.autogram._scratch import Scratch
from jdcore.autogram._stream import stream
from jdcore.autogram._survey import Site, Survey, survey
from jdcore.autogram._validation import refuse_impossible
from jdcore.autogram.blocks import Block, Gradients, RowsBlock, combined
from jdcore.autogram.rules._direct import Place


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
        self._open = OpenParameters(self._found)
        self._blocks: list[Block] = []

    # -- which parameters are served how -----------------------------------------------------------

    def _pin(self) -> None:
        """Without samples, ordinary gradients are rows of J: only a cheaper closed form is used."""
        found, K = self._found, self._objectives.tasks
        shared = self._shared()
        for record, site in list(found.sites.items()):
            beats_rows = getattr(record.served.rule, "beats_rows", None)
            if not (
                shared.isdisjoint(site.reached)
                and beats_rows is not None
                and beats_rows(record.served.module, record.args, record.output_shape, K)
            ):
                self._pinned.update(dict.fromkeys(site.reached))
                del found.sites[record]
        self._pinned.update(dict.fromkeys([*found.stray, *found.uses]))
        found.uses.clear()
        found.stray.clear()

    def _shared(self) -> set[Parameter]:
        """Parameters that several calls use, or anything but a call."""
        once: set[Parameter] = set()
        several = {*self._found.stray, *self._found.uses}
        for site in self._sites():
            several |= once & site.reached
            once |= site.reached
        return several

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
        with torch.no_grad(), _without_autocast(output.device.type):
            graph_needed = retain_graph or bool(self._open) or (keep and bool(self._found.leaves))
            captured, layouts = self._capture(gramian, graph_needed)
            blocks = combined(list(self._make_blocks(captured, layouts)))
            captured.clear()
            self._add(blocks, gramian)
        return self._objectives.gramian(gramian.total)

    def _add(self, blocks: list[Block], gramian: Accumulator) -> None:
        if gramian.keep:
            self._blocks += blocks
        while blocks:
            blocks.pop(0).add_gramian(gramian)

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
        with torch.no_grad(), _without_autocast(weights.device.type):
            while self._blocks:
                block = self._blocks.pop(0)
                block.add_weighted(by_task.to(block.dtype), gradients_of)
        return gradients_of.of  # type: ignore[return-value]  # Parameters are Tensors

    # -- the backward passes -----------------------------------------------------------------------

    def _capture(
        self, gramian: Accumulator, graph_needed: bool
    ) -> tuple[dict[Any, Tensor], Layouts]:
        places: dict[Place, Site | None] = dict.fromkeys(self._open.places())
        for site in self._sites():
            places.update(((e.node, e.output_nr), site) for e in site.edges.values())
        kind = kind_of(self._objectives, self._found, places)
        layouts = self._probe.layouts(kind) if self._objectives.samples > 1 else ()
        if layouts is not None and self._objectives.tasks == 1 and not self._pinned:
            captured = self._stream(places, gramian, graph_needed)
            return captured, dict(zip(places, layouts, strict=False))
        keys: list[Any] = [*places, *self._pinned]
        inputs = [GradientEdge(*key) if isinstance(key, tuple) else key for key in keys]
        probed = probe_pass(self._objectives, inputs) if layouts is None else []
        grads = capture(self._objectives, inputs, self._found.operations, graph_needed)
        if layouts is None:
            findings = findings_of(self._objectives, places, grads, probed)
            layouts = tuple(finding.layout for finding in findings)
            if all(finding.sure for finding in findings):
                self._probe.remember(kind, layouts)
        captured = {k: g for k, g in zip(keys, grads, strict=True) if g is not None}
        return captured, dict(zip(places, layouts, strict=False))

    def _stream(
        self, places: dict[Place, Site | None], gramian: Accumulator, graph_needed: bool
    ) -> dict[Any, Tensor]:
        """
        Add the share of each layer when its gradients come.

        :returns: What has to wait: gradients that concern parameters used in several places.
        """
        shared = self._shared()
        captured: dict[Any, Tensor] = {}

        def receive(place: Place, gradient: Tensor) -> None:
            captured[place] = gradient.unsqueeze(0)
            site = places[place]
            if site is None or site.record.served.rule is None:
                return
            needed = [(edge.node, edge.output_nr) for edge in site.edges.values()]
            if shared.isdisjoint(site.reached) and all(other in captured for other in needed):
                blocks = combined(list(self._blocks_of(site, captured)))
                for other in needed:
                    del captured[other]
                self._add(blocks, gramian)

        stream(self._objectives, places, self._found.children, receive, graph_needed)
        return captured

    def _sites(self) -> Iterable[Site]:
        return self._found.sites.values()

    # -- the blocks --------------------------------------------------------------------------------

    def _make_blocks(self, captured: dict[Any, Tensor], layouts: Layouts) -> Iterator[Block]:
        for parameter in self._pinned:
            if parameter in captured:
                yield RowsBlock(parameter, widened(captured[parameter]).unsqueeze(1))
        if self._open:
            yield from self._open.blocks(captured, layouts, self._objectives)
        for site in self._sites() if captured else ():
            yield from self._blocks_of(site, captured)

    def _blocks_of(self, site: Site, captured: dict[Any, Tensor]) -> Iterator[Block]:
        rule, grads = site.record.served.rule, grads_of(site, captured)
        if rule is not None and grads and site.reached:
            yield from rule.blocks(_call(site, grads, self._objectives.samples))


def _call(site: Site, grads: dict[int, Tensor], samples: int) -> LayerCall:
    record = site.record
    for gradient in grads.values():
        length = gradient.shape[1] if gradient.ndim > 1 else 1
        check_batch(record.served.label, length, samples)
    return LayerCall(
        module=record.served.module,
        args=tuple(_widened(argument) for argument in record.args),
        kwargs={name: _widened(argument) for name, argument in record.kwargs.items()},
        training=record.training,
        batch_size=samples,
        output_grads=tuple(widened(grads.get(index)) for index in range(max(grads) + 1)),
        reached=frozenset(site.reached),
    )


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Entering autocast costs as much as some layers, also where nothing is to be turned off.
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def _widened(argument: Any) -> Any:
    return widened(argument) if isinstance(argument, Tensor) else tree_map(widened, argument)
