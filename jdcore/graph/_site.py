from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Size, Tensor

from jdcore.graph._layout import Layout
from jdcore.graph._saved import saved
from jdcore.graph.shares import Dense, sum_over


class NoRule(Exception):  # noqa: N818 - a signal, not an error
    """A rule does not hold here: the operation is called once for each sample instead."""


@define(eq=False)
class Site:
    """
    An operation some of whose operands belong to no sample, as its rule sees it.

    There are K losses for each of B samples.

    :param node: The node of the graph; for a ``torch.autograd.Function``, its context, with
        ``saved_tensors`` and whatever else the forward pass left there.
    :param name: The name of the node.
    :param grads: The gradients at its results, shape ``[K, *result.shape]`` each, None where there
        is none.
    :param layouts: Where the samples are in each result.
    :param shapes: By operand, its shape: the operands that shares are wanted for.
    """

    node: Any
    name: str
    grads: Sequence[Tensor | None]
    layouts: Sequence[Layout | None]
    shapes: Mapping[int, Size]
    tensors: Mapping[str, Any] = field(factory=dict)
    """The tensors that the operation saved, where a pass may have freed them since."""
    memo: dict[Any, Any] = field(factory=dict)
    """Room for what several operands have in common."""

    @property
    def grad(self) -> Tensor:
        """
        The gradients at the only result that has any, which is the first.

        :raises NoRule: If there are others.
        """
        first, *others = self.grads
        if first is None or (others and any(g is not None for g in others)):
            raise NoRule
        return first

    @property
    def layout(self) -> Layout:
        """Where the samples are in the first result."""
        layout = self.layouts[0]
        if layout is None:
            raise NoRule
        return layout

    @property
    def samples(self) -> int:
        """B."""
        return next(layout.samples for layout in self.layouts if layout is not None)

    @property
    def samples_lead(self) -> bool:
        """Whether the samples come one after the other in the first dimension of the result."""
        first = self.grads[0]
        return first is not None and self.layout.leads(first.shape[1])

    def saved(self, name: str) -> Any:
        """
        What the operation saved, by its name in the formulas of torch's derivatives.

        :raises Unreadable: If torch does not show it, which is as good as :class:`NoRule`.
        :raises NoRule: If it is sparse.
        """
        tensors = self.tensors
        value = tensors[name] if name in tensors else saved(self.node, name)
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise NoRule
        # Not detached, which would cost as much as a view: rules run where nothing is recorded.
        return value

    def positions(self, tensor: Tensor, lead: int = 0, features: int = 1) -> Tensor:
        """
        Bring samples to the front and all other positions behind them.

        :param tensor: Laid out like the first result, but for its last ``features`` dimensions.
        :param lead: Dimensions before those of the result: 1 for gradients.
        :returns: Shape ``[*lead, B, T, *features]``.
        :raises NoRule: If the samples are in one of the features.
        """
        layout, shape = self.layout, tensor.shape
        end = len(shape) - features
        if not layout.dim + lead < end:
            raise NoRule
        if not layout.leads(shape[lead]):  # the samples have to be collected
            split = layout.split(tensor, lead)
            return split.flatten(lead + 1, split.ndim - features - 1)
        count = layout.after * shape[lead + 1 : end].numel()
        sizes = *shape[:lead], layout.samples, count, *shape[end:]
        return tensor if sizes == shape else tensor.reshape(sizes)  # each view costs a call

    def of_channels(self, grads: Tensor, operand: int) -> Dense:
        """:meth:`broadcast` for an operand with an entry for each channel, as biases have it."""
        # Channels come behind the samples, and before what is summed over.
        shape = self.shapes[operand]
        return self._broadcast(grads, (*shape, *[1] * (grads.ndim - 3)), shape)

    def broadcast(self, grads: Tensor, operand: int) -> Dense:
        """
        The share of an operand that was broadcast to the shape of the first result.

        :param grads: What the gradients are multiplied by, summed up over all that the operand was
            broadcast to, shape ``[K, *result.shape]``.
        :raises NoRule: If the operand has samples of its own.
        """
        shape = self.shapes[operand]
        return self._broadcast(grads, shape, shape)

    def _broadcast(self, grads: Tensor, given: Sequence[int], shape: Size) -> Dense:
        dim = self.layout.dim
        # Broadcasting puts missing dimensions in front.
        full = (1,) * (grads.ndim - 1 - len(given)) + tuple(given)
        if full[dim] != 1:
            raise NoRule
        split = self.layout.split(grads, 1)  # [K, B, dims before, before, after, dims after]
        summed, axis = [], 2
        for d, n in enumerate(full):
            axes = [axis, axis + 1] if d == dim else [axis]
            summed += [a for a in axes if n == 1 and split.shape[a] != 1]
            axis += len(axes)
        return Dense(sum_over(split, summed) if summed else split, shape)

    def turned(self, dim: int) -> Site:
        """The same site, with the samples of the first result in another dimension."""
        return evolve(self, layouts=[evolve(self.layout, dim=dim), *self.layouts[1:]])


@define(eq=False)
class Layers(Site):
    """
    Several operations of one form, as their rule sees them: as the tasks of one of them.

    What they saved lies one behind the other in a first dimension, as their gradients do.

    :param operations: Their nodes, and what each saved.
    """

    operations: Sequence[tuple[Any, Mapping[str, Any]]] = ()

    def saved(self, name: str) -> Any:
        """
        What all of them saved.

        :raises NoRule: If they did not save the same number, or tensors of one form.
        """
        if name not in self.memo:
            values = [
                tensors[name] if name in tensors else saved(node, name)
                for node, tensors in self.operations
            ]
            if isinstance(values[0], Tensor):
                self.memo[name] = alike(values, torch.stack)
            elif values.count(values[0]) == len(values):
                self.memo[name] = values[0]
            else:
                raise NoRule
        return self.memo[name]

    def positions(self, tensor: Tensor, lead: int = 0, features: int = 1) -> Tensor:
        return super().positions(tensor, 1, features)


_FORM = attrgetter("shape", "dtype", "layout", "device")


def alike(tensors: Sequence[Any], join: Callable[[Any], Tensor]) -> Tensor:
    """
    Tensors of several operations, one behind the other.

    :param join: Puts tensors of one form together.
    :raises NoRule: If they are not dense and of one form.
    """
    if tensors[0].layout != torch.strided or len(set(map(_FORM, tensors))) > 1:
        raise NoRule
    return join(tensors)
