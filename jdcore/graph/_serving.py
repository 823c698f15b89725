from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from jdcore.errors import UnservedGraphError
from jdcore.graph._call import called_shares
from jdcore.graph._graph import Graph
from jdcore.graph._memory import Memory, pieces
from jdcore.graph._passes import Grads, Heard
from jdcore.graph._plan import Plan, Spot
from jdcore.graph._root_shares import SHORT, RootShares
from jdcore.graph._saved import Unreadable, all_saved
from jdcore.graph._site import Layers, NoRule, Site, alike
from jdcore.graph.rules import Rule, Rules
from jdcore.graph.shares import Dense, Outer, Share


@frozen(eq=False)
class Serving:
    """
    Makes shares of the gradients at operations, by their rules or by calling them.

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
        grads: Grads,
        tensors: Mapping[str, Any],
    ) -> tuple[Site, list[int]] | None:
        """
        All gradients at an operation of the frontier are there: make the shares of what enters it.

        :param grads: At its results, shape ``[K, *result.shape]`` each.
        :param tensors: What it saved, if a pass may have freed it.
        :returns: The operation and its operands without a rule, None if there is none.
        """
        spot = self.plan.spots[node]
        if spot.silent:
            # Where nothing depends on a result, what arrives there is zero.
            pairs = zip(spot.layouts, grads, strict=True)
            grads = [None if layout is None else grad for layout, grad in pairs]
        if not [grad for grad in grads if grad is not None]:
            return None
        of_place = spot.name, grads, spot.layouts, spot.shapes
        site = Site(self.graph.nodes[node], *of_place, tensors)
        # Of complex numbers some factors are conjugated, which the node itself knows best.
        make = None if spot.complex else self.rules.find(site.name, site.node)
        try:
            shares = _shares(make, site, spot)
        except UnservedGraphError as error:  # of a rule, which knows no parameters
            error.at(self.graph.belonging_to(site.node))
            raise
        rest = []
        joined = [root for operand, root in spot.roots.items() if operand not in shares]
        for operand, share in shares.items():
            if share is None:
                rest.append(operand)
            else:
                given = [spot.roots[operand]], share, spot.name, "closed form"
                biases = joined if operand == 2 else ()
                self.roots.take(*given, biases=biases, beside_others=spot.beside)
        return (site, rest) if rest else None

    def call(self, node: int, site: Site, rest: list[int]) -> None:
        """
        Call an operation whose rule does not serve some of its operands.

        :param site: As :meth:`serve` returned it.
        :param rest: Likewise.
        """
        spot = self.plan.spots[node]
        for operand, share in called_shares(site, rest, self.memory).items():
            self.roots.take([spot.roots[operand]], share, spot.name, "called for each sample")

    # -- several operations at once ----------------------------------------------------------------

    def serve_alike(self, heard: Iterable[Heard]) -> Iterable[Heard]:
        """
        Serve operations of one form by one call of their rule, where that spares launches.

        What they saved and their gradients are copied for that, as long as there is room.

        :param heard: Operations, and their gradients for one task.
        :returns: Those that are left, which belong to no others or for which there is no room.
        """
        groups: dict[Hashable, list[Heard]] = {}
        for one in heard:
            node, [grad, *others], _ = one
            kind = self.plan.spots[node].alike
            if kind is None or grad is None or [g for g in others if g is not None]:
                yield one
            else:
                groups.setdefault(kind, []).append(one)
            del one, grad, others  # freed as soon as they are served
        for group in groups.values():
            yield from self._of_group(group)

    def _of_group(self, group: list[Heard]) -> Iterable[Heard]:
        size = _entries(self.graph.nodes[group[0][0]], group[0])
        count = self.memory.joined // size if size else 1
        for start, stop in pieces(len(group), max(1, count)):
            some, group[: stop - start] = group[: stop - start], []
            if len(some) == 1 or not self._serve_layers(some, len(some) * size):
                yield from some

    def _serve_layers(self, heard: Sequence[Heard], entries: int) -> bool:
        """
        Serve several operations by one call of their rule.

        :param entries: Of what is copied.
        :returns: Whether it serves them; else nothing is done.
        """
        if not self.roots.has_room(entries):
            return False
        spots = [self.plan.spots[node] for node, _, _ in heard]
        nodes, spot = [self.graph.nodes[node] for node, _, _ in heard], spots[0]
        rule = self.rules.find(spot.name, nodes[0])
        try:
            grads = alike([of_results[0] for _, of_results, _ in heard], torch.cat)
            of_place = spot.name, [grads], spot.layouts, spot.shapes
            saved = [(n, tensors) for n, (_, _, tensors) in zip(nodes, heard, strict=True)]
            site = Layers(nodes[0], *of_place, operations=saved)
            found = _shares(rule, site, spot)
        except NoRule:
            return False
        shares = {operand: share for operand, share in found.items() if share is not None}
        if len(shares) < len(found) or any(
            isinstance(s, Dense) and s.shape.numel() >= SHORT for s in shares.values()
        ):
            return False
        for operand, share in shares.items():
            biases = [root for of in spots for p, root in of.roots.items() if p not in found]
            given = [of.roots[operand] for of in spots], share, spot.name, "closed form"
            self.roots.take(*given, biases=biases, copied=entries)
        return True


def _entries(node: Any, heard: Heard) -> int:
    """
    Of the gradient at an operation and of what it saved that is laid out like it.

    :returns: 0 if Python code makes what it saved.
    """
    _, [grad, *_], given = heard
    tensors = given or all_saved(node)
    if grad is None or tensors is None:
        return 0
    lead = grad.shape[1:2]
    saved = [t for t in tensors.values() if isinstance(t, Tensor) and t.shape[:1] == lead]
    return sum([t.numel() for t in saved], grad.numel())


def _shares(rule: Rule | None, site: Site, spot: Spot) -> dict[int, Share | None]:
    """The shares of the operands, None where the rule does not serve; of joined biases none."""
    shares: dict[int, Share | None] = {}
    for operand in spot.roots:
        if not (spot.may_join and operand == 0 and _joins_bias(site, shares[2])):
            shares[operand] = _made(rule, site, operand)
    return shares


def _joins_bias(site: Site, weight: Share | None) -> bool:
    """
    Whether a bias is the weight of one more input, which is 1.

    :param weight: The share of the weight, which is that of both afterwards.
    """
    if not isinstance(weight, Outer):
        return False
    (_, _, positions, outputs), shape = weight.grads.shape, site.shapes[0]
    # One bias may be added to all outputs, to each sample another one, or more of it than of the
    # product.
    if positions > 1 or shape[-1:] != (outputs,) or shape.numel() != outputs:
        return False
    # Only then do both have the same gradient: that of the product times alpha, that of the bias
    # times beta.
    if site.saved("alpha") != site.saved("beta"):
        return False
    weight.bias = shape
    return True


def _made(rule: Rule | None, site: Site, operand: int) -> Share | None:
    if rule is None:
        return None
    try:
        return rule(site, operand)
    except (NoRule, Unreadable):
        return None
