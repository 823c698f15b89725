"""
Hooks of the operations that accumulate into the ``.grad`` of leaves.

Before there was ``register_post_accumulate_grad_hook``, optimizers that step in the backward pass
put their hooks there (``param.expand_as(param).grad_fn.next_functions[0][0].register_hook``), as
some still do. Passes that return gradients do not execute these operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from jdcore._handles import Hooks, hooks_made, hooks_of


@frozen(eq=False)
class AccumulatorHooks:
    """
    The hooks of the operation that accumulates into a leaf, in the dictionaries that torch calls.

    :param before: Those that are given the gradient, and may replace it.
    :param after: Those that run when it has been accumulated.
    """

    before: Hooks
    after: Hooks

    def replaced(self, gradient: Tensor) -> Tensor:
        """What the hooks make of a gradient that is to be accumulated."""
        for hook in list(self.before.values()):  # a hook may remove itself
            result = hook((gradient,))
            if result is not None:
                [gradient] = result if isinstance(result, tuple) else (result,)
        return gradient

    def accumulated(self, gradient: Tensor) -> None:
        """Run what follows a gradient that has been accumulated."""
        for hook in list(self.after.values()):
            hook((), (gradient,))  # the operation gives nothing on


@define(eq=False)
class _Accumulators:
    """
    Which leaves have such hooks.

    To ask takes some microseconds for each leaf. So those that have none are remembered until there
    are more hooks of any kind, be it anywhere. They are remembered by their numbers, as hooks of a
    later tensor of the same number are newer.
    """

    made: int = 0
    without: set[int] = field(factory=set)

    def hooks_of(self, leaves: Iterable[Tensor]) -> dict[Tensor, AccumulatorHooks]:
        """The hooks of those leaves that have some."""
        made = hooks_made()
        if made != self.made:
            self.made, self.without = made, set()
        without = self.without
        found: dict[Tensor, AccumulatorHooks] = {}
        # In one expression, which takes no call of Python for each leaf.
        for leaf in [leaf for leaf in leaves if id(leaf) not in without]:
            # What is frozen shows none, but may have some when it is thawed.
            if not (leaf.is_leaf and leaf.requires_grad):
                continue
            hooks = _found(leaf)
            if hooks is None:
                without.add(id(leaf))
            else:
                found[leaf] = hooks
        return found


def _found(leaf: Tensor) -> AccumulatorHooks | None:
    with torch.inference_mode(False):  # where leaves show no graph
        before, after = hooks_of(get_gradient_edge(leaf).node)
    return AccumulatorHooks(before, after) if before or after else None


_ACCUMULATORS = _Accumulators()
accumulator_hooks = _ACCUMULATORS.hooks_of
