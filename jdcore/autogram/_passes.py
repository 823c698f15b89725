"""
Backward passes: from the losses to gradients at chosen places of the graph, for all tasks.

The gradients are captured where the graph has them; no hook runs during these passes, so neither
threads nor ``torch.vmap`` matter to what receives them. Where one pass serves all losses,
:mod:`jdcore.autogram._stream` needs less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Operations whose derivatives are batched without a loop, so that one vmapped pass over all tasks
# beats one pass per task. Convolutions are not among them: their batched backward is slower.
_BATCHABLE = frozenset(
    {
        "AddBackward0",
        "AddmmBackward0",
        "CloneBackward0",
        "DivBackward0",
        "ExpandBackward0",
        "GeluBackward0",
        "LeakyReluBackward0",
        "LogSoftmaxBackward0",
        "MeanBackward0",
        "MeanBackward1",
        "MmBackward0",
        "MseLossBackward0",
        "MulBackward0",
        "NegBackward0",
        "PowBackward0",
        "ReluBackward0",
        "SelectBackward0",
        "SigmoidBackward0",
        "SiluBackward0",
        "SliceBackward0",
        "SoftmaxBackward0",
        "SqueezeBackward1",
        "StackBackward0",
        "SubBackward0",
        "SumBackward0",
        "SumBackward1",
        "TBackward0",
        "TanhBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)


@frozen
class Objectives:
    """
    The losses, seen as K tasks by B samples.

    :param output: The losses as given.
    :param batch_dim: Their dimension of samples, None if there is none: then B = 1.
    """

    output: Tensor
    batch_dim: int | None

    @property
    def samples(self) -> int:
        return 1 if self.batch_dim is None else self.output.shape[self.batch_dim]

    @property
    def tasks(self) -> int:
        return self.output.numel() // max(1, self.samples)

    def by_task(self, tensor: Tensor) -> Tensor:
        """Bring a tensor of the shape of the losses into the shape [K, B]."""
        if self.batch_dim is None:
            return tensor.reshape(-1, 1)
        return tensor.movedim(self.batch_dim, -1).reshape(self.tasks, self.samples)

    def from_tasks(self, tensor: Tensor) -> Tensor:
        """Bring a tensor [K, B, ...] into the shape [*losses, ...]."""
        rest = tensor.shape[2:]
        if self.batch_dim is None:
            return tensor.reshape((*self.output.shape, *rest))
        moved = self.output.movedim(self.batch_dim, -1).shape
        return tensor.reshape((*moved, *rest)).movedim(len(moved) - 1, self.batch_dim)

    def gramian(self, total: Tensor) -> Tensor:
        """Bring rows and columns from the order [K, B] into that of the flattened losses."""
        m = self.output.numel()
        if self.batch_dim is None or self.tasks == 1:
            return total
        last, moved = self.output.ndim - 1, self.output.movedim(self.batch_dim, -1).shape
        axes = self.batch_dim, last + 1 + self.batch_dim
        return total.view(*moved, *moved).movedim((last, 2 * last + 1), axes).reshape(m, m)

    def seed(self, weights: Tensor) -> Tensor:
        """What to start a backward pass with, for weights [K, B]."""
        return self.from_tasks(weights).to(self.output.dtype)


def capture(
    objectives: Objectives,
    inputs: Sequence[Tensor | GradientEdge],
    operations: set[str],
    retain_graph: bool,
) -> list[Tensor | None]:
    """
    Gradients of each task, summed over its samples.

    :param inputs: Where to take them.
    :param operations: Names of the nodes of the graph.
    :returns: One tensor [K, *shape] per input, None where no task reaches it.
    """
    if not inputs:
        return []
    if objectives.batch_dim is None and objectives.tasks > 1 and operations <= _BATCHABLE:
        return _vmapped(objectives, inputs, retain_graph)
    return _sequential(objectives, inputs, retain_graph)


def gradients(
    objectives: Objectives,
    inputs: Sequence[Any],
    weights: Tensor | None,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Gradients of the losses weighted by [K, B] (None: of their sum), one tensor per input."""
    output = objectives.output
    seed = torch.ones_like(output) if weights is None else objectives.seed(weights)
    return list(
        torch.autograd.grad(output, inputs, seed, retain_graph=retain_graph, allow_unused=True)
    )


def _sequential(
    objectives: Objectives, inputs: Sequence[Any], retain_graph: bool
) -> list[Tensor | None]:
    K, B = objectives.tasks, objectives.samples
    output = objectives.output
    basis = torch.eye(K, dtype=output.dtype, device=output.device)[..., None].expand(K, K, B)
    collected: list[Tensor | None] = [None] * len(inputs)
    for k in range(K):
        found = gradients(objectives, inputs, basis[k], retain_graph or k < K - 1)
        for position, gradient in enumerate(found):
            if gradient is not None:
                collected[position] = _with_row(collected[position], gradient, k, K)
        del found
    return collected


def _with_row(rows: Tensor | None, gradient: Tensor, k: int, K: int) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if K == 1:
        return gradient.unsqueeze(0)
    if rows is None:
        rows = gradient.new_zeros(K, *gradient.shape)
    rows[k] = gradient
    return rows


def _vmapped(
    objectives: Objectives, inputs: Sequence[Any], retain_graph: bool
) -> list[Tensor | None]:
    reached: list[int] = []

    def one_task(seed: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(
            objectives.output, inputs, seed, retain_graph=retain_graph, allow_unused=True
        )
        reached[:] = [i for i, gradient in enumerate(found) if gradient is not None]
        return tuple(found[i] for i in reached)

    K = objectives.tasks
    eye = torch.eye(K, dtype=objectives.output.dtype, device=objectives.output.device)
    rows = torch.vmap(one_task)(eye.view(K, *objectives.output.shape))
    collected: list[Tensor | None] = [None] * len(inputs)
    for position, tensor in zip(reached, rows, strict=True):
        collected[position] = tensor
    return collected
