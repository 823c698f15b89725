from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen
from torch import Tensor

from jdcore.graph._call import called_shares
from jdcore.graph._graph import Graph
from jdcore.graph._memory import Memory
from jdcore.graph._plan import Plan, Spot
from jdcore.graph._root_shares import RootShares
from jdcore.graph._saved import Unreadable
from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules import Rule, Rules
from jdcore.graph.shares import Dense, Outer, Share


@frozen(eq=False)
class Serving:
    """
    Makes shares of the gradients at operations, by their rules or by calling them.

    :param graph: The graph.
    :param plan: What is known of it.
    :param rules: What is known of operations.
    :param memory: How large temporaries may be.
    :param roots: What takes the shares.
    """

    graph: Graph
    plan: Plan
    rules: Rules
    memory: Memory
    roots: RootShares

    def serve(
        self,
        node: int,
        grads: Sequence[Tensor | None],
        tensors: Mapping[str, Any],
    ) -> tuple[Site, list[int]] | None:
        """
        All gradients at an operation of the frontier are there: make the shares of what enters it.

        :param grads: At its results, shape ``[K, *result.shape]`` each.
        :param tensors: What it saved, if a pass may have freed it.
        :returns: The operation and its operands without a rule, None if there is none.
        """
        spot = self.plan.spot(self.graph.form, node)
        if spot.silent:
            # Where nothing depends on a result, what arrives there is zero.
            pairs = zip(spot.layouts, grads, strict=True)
            grads = [None if layout is None else grad for layout, grad in pairs]
        if all(g is None for g in grads):
            return None
        of_place = spot.name, grads, spot.layouts, spot.shapes, spot.known
        site = Site(self.graph.nodes[node], *of_place, tensors)
        rest, shares = [], {}
        # Of complex numbers some factors are conjugated, which the node itself knows best.
        make = None if spot.complex else self.rules.find(site.name, site.node)
        for operand in spot.roots:
            share = _made(make, site, operand)
            if share is None:
                rest.append(operand)
            else:
                shares[operand] = share
        if spot.may_join:
            self._join_bias(site, spot, shares)
        for operand, share in shares.items():
            self.roots.take(spot.roots[operand], share, spot.name, "closed form")
        return (site, rest) if rest else None

    def call(self, node: int, site: Site, rest: list[int]) -> None:
        """
        Call an operation whose rule does not serve some of its operands.

        :param site: As :meth:`serve` returned it.
        :param rest: Likewise.
        """
        spot = self.plan.spot(self.graph.form, node)
        masks = [
            None if g is None or layout is None else layout.masks(g[0])
            for g, layout in zip(site.grads, site.layouts, strict=True)
        ]
        shapes = {operand: site.shapes[operand] for operand in rest}
        for operand, share in called_shares(
            site.node, site.name, site.grads, masks, shapes, self.memory
        ).items():
            self.roots.take(spot.roots[operand], share, spot.name, "called for each sample")

    def _join_bias(self, site: Site, spot: Spot, shares: dict[int, Share]) -> None:
        """The bias of a linear layer is the weight of one more input, which is 1."""
        weight, bias = shares.get(2), shares.get(0)
        if not (isinstance(bias, Dense) and isinstance(weight, Outer)):
            return
        _, _, positions, outputs = weight.grads.shape
        # One bias may be added to all outputs, or more of it than of the product.
        if positions > 1 or bias.shape.numel() != outputs:
            return
        # Only then do both have the same gradient: that of the product times alpha, that of the
        # bias times beta.
        if site.saved("alpha") == site.saved("beta"):
            weight.plus = 1.0
            del shares[0]
            self.roots.take_counted(spot.roots[0], bias, spot.name, "with its weight")


def _made(rule: Rule | None, site: Site, operand: int) -> Share | None:
    if rule is None:
        return None
    try:
        return rule(site, operand)
    except (NoRule, Unreadable):
        return None
