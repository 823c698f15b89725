from __future__ import annotations

from collections.abc import Iterator

from attrs import define, field
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._passes import Objectives
from jdcore.autogram._survey import Site, Survey
from jdcore.autogram.blocks import Block, RowsBlock
from jdcore.autogram.rules._direct import (
    Layout,
    Operand,
    Place,
    Results,
    block_of_use,
    operands,
)
from jdcore.autogram.rules._generic import rows_of_call, rows_of_losses

Layouts = dict[Place, "Layout | None"]


@define
class _Group:
    """Uses of one parameter inside of one recorded call, or outside of all."""

    site: Site | None
    uses: list[Operand] = field(factory=list)


class OpenParameters:
    """
    The parameters that no closed form of a layer covers.

    Each is served by the operations that use it where all of these are known; else, inside of a
    recorded call, by backward passes through that call; else by backward passes from the losses.

    :param found: The graph.
    """

    def __init__(self, found: Survey) -> None:
        self._sites = found.sites
        self._groups: dict[Parameter, list[_Group]] = {}
        for parameter, uses in found.uses.items():
            groups: dict[Site | None, _Group] = {}
            for (node, position), site in uses.items():
                group = groups.setdefault(site, _Group(site))
                group.uses += operands(Operand(node, position), found.parents)
            self._groups[parameter] = list(groups.values())

    def __bool__(self) -> bool:
        return bool(self._groups)

    def places(self) -> Iterator[Place]:
        """Where gradients are needed."""
        for groups in self._groups.values():
            for group in groups:
                yield from (place for use in group.uses if use.known for place in use.places)

    def blocks(
        self,
        captured: dict[Place, Tensor],
        layouts: Layouts,
        objectives: Objectives,
    ) -> Iterator[Block]:
        """
        The blocks of all these parameters.

        :param captured: Gradients at the places, shape [K, ...].
        :param layouts: Where the samples are at each place; None where they mix.
        """
        results = Results(captured, layouts, objectives.samples)
        rows: dict[Site, list[Parameter]] = {}
        by_definition: list[Parameter] = []
        for parameter, groups in self._groups.items():
            blocks: list[Block] = []
            through: list[Site] = []
            for group in groups:
                closed = _closed(parameter, group, results)
                if closed is not None:
                    blocks += closed
                elif group.site is not None and _apart(group.site, layouts):
                    through.append(group.site)
                else:
                    by_definition.append(parameter)
                    break
            else:
                yield from blocks
                for site in through:
                    rows.setdefault(site, []).append(parameter)
        for site in self._sites.values():
            # Rows by definition hold all uses, also those that a rule would have served.
            site.reached.difference_update(by_definition)
        yield from _rows(rows, captured, layouts, objectives.samples)
        if by_definition:
            yield from rows_of_losses(objectives, by_definition)


def _closed(parameter: Parameter, group: _Group, results: Results) -> list[Block] | None:
    blocks = []
    for use in group.uses:
        block = block_of_use(parameter, use, results)
        if block is None:
            return None
        blocks.append(block)
    return blocks


def _apart(site: Site, layouts: Layouts) -> bool:
    """Whether the samples can be told apart at all outputs of a call."""
    edges = [layouts.get((e.node, e.output_nr), "major") for e in site.edges.values()]
    return not site.leaky and None not in edges


def _rows(
    rows: dict[Site, list[Parameter]],
    captured: dict[Place, Tensor],
    layouts: Layouts,
    samples: int,
) -> Iterator[RowsBlock]:
    for site, parameters in rows.items():
        grads = grads_of(site, captured)
        if grads:
            places = [(site.edges[i].node, site.edges[i].output_nr) for i in grads]
            found = [layouts.get(place) or "major" for place in places]
            yield from rows_of_call(site, parameters, grads, found, samples)


def grads_of(site: Site, captured: dict[Place, Tensor]) -> dict[int, Tensor]:
    """Gradients at the outputs of a call, by number of the output."""
    return {
        index: captured[edge.node, edge.output_nr]
        for index, edge in site.edges.items()
        if (edge.node, edge.output_nr) in captured
    }
