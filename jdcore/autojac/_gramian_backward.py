from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from jdcore._fields import check_grads, write_grads
from jdcore.aggregation import GramianAggregator, GramianSource, as_weighting, weigh
from jdcore.autojac import _checks as checks
from jdcore.autojac._backward import reached
from jdcore.autojac._gradients import as_matrix
from jdcore.autojac._problem import Problem
from jdcore.autojac._stream import cheap_products, grouped_gramian, streamed_gramian
from jdcore.autojac._vmap import Kind, attempt
from jdcore.autojac.transform import Diagonalize, Init
from jdcore.distributed._refusals import refuse_replicated, refuse_sharded
from jdcore.graph import reach
from jdcore.linalg import combine, gramian
from jdcore.protocols import Weighting

# Entries of a Jacobian that is not worth a second pass: 4 MB in float32.
_SMALL = 1 << 20


def gramian_backward(
    tensors: Tensor | Sequence[Tensor],
    /,
    weighting: Weighting | GramianAggregator,
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    retain_graph: bool = False,
) -> Tensor:
    """
    One step of a Gramian method without holding its Jacobian: straight to the ``.grad``.

    The same update as ``backward`` followed by ``jac_to_grad``, in two stages: the Gramian is
    summed up parameter by parameter, the rows of each parameter being freed at once; then one
    ordinary backward pass differentiates the weighted sum of the objectives. The weight of a linear
    layer that is used once, on fewer samples than it has inputs, needs no rows at all: its share
    comes from the gradients at the layer. The memory above that of an ordinary backward pass is m
    times the largest parameter that is not of this kind, not m times all of them. Only a Jacobian
    of less than a million entries is held, as that is faster.

    Choose it when the Jacobian does not fit into memory, or layers are wide and fully connected.
    Measured against ``backward`` and ``jac_to_grad`` with one CPU thread and m = 8: linear layers
    of 4096 units take a quarter of the time and a ninth of the memory, a ResNet-18 takes 1.4 times
    the time and 0.7 of the memory, a perceptron 64 units wide the same. Against
    :meth:`Engine.backward <jdcore.autogram.Engine.backward>`: 0.7 of the time for 8 or 16 losses of
    those linear layers on a whole batch, but 10 to 20 times as long for one loss per sample
    (perceptrons, a small CNN), which is what the engine is for. Where vmap cannot batch the graph,
    row-by-row passes are repeated for each group of parameters that fits into that memory.

    :param tensors: What to differentiate. All their elements, in order, are the m objectives.
    :param weighting: A weighting, or the aggregator of one. A plain function is taken as a
        weighting: Gramian [m, m] to weights [m].
    :param inputs: Tensors with respect to which to differentiate. By default all leaves behind
        ``tensors``.
    :param retain_graph: Whether to keep the graph for another differentiation.
    :returns: The weights [m]. They act rounded to the dtype of the tensors.
    :raises ParameterError: If an argument does not fit; see its message.

    >>> import torch
    >>> from jdcore.autojac import gramian_backward
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gramian_backward([w.sum(), (w**2).sum()], lambda gramian: gramian.diagonal().rsqrt())
    tensor([0.7071, 0.2236])
    >>> w.grad
    tensor([1.1543, 1.6015])
    """
    outputs = checks.tensor_list(tensors, "tensors")
    checks.check_outputs(outputs, "tensors")
    chosen = as_weighting(weighting)
    checks.check_flag(retain_graph, "retain_graph")
    targets = reached(reach(outputs), inputs)
    refuse_sharded(targets, "inputs")
    refuse_replicated(targets, "inputs")
    check_grads(targets)
    weights, gradients = _step(chosen, outputs, targets, retain_graph)
    write_grads(dict(zip(targets, gradients, strict=True)))
    return weights.to(reduce(torch.promote_types, (target.dtype for target in targets)))


def _step(
    weighting: Weighting, outputs: list[Tensor], targets: list[Tensor], retain_graph: bool
) -> tuple[Tensor, list[Tensor]]:
    """The weights, and one gradient for each target."""
    m = sum(output.numel() for output in outputs)
    problem = _problem(outputs, targets)
    small = m * sum(target.numel() for target in targets) <= _SMALL
    blocks: list[Tensor] = []

    def compute() -> Tensor:
        if not small:
            return _gramian(problem)
        blocks.extend(as_matrix(row) for row in problem.jacobians(retain_graph))
        return gramian(blocks)

    precision = max((target.dtype for target in targets), key=lambda dtype: torch.finfo(dtype).eps)
    losses = torch.cat([output.detach().reshape(-1).to(targets[0].device) for output in outputs])
    source = GramianSource(m, precision, targets[0].device, compute, losses=losses)
    weights = weigh(weighting, source).to(targets[0].device, copy=True)
    if not blocks:
        return weights, _weighted_gradients(outputs, targets, weights, retain_graph)
    pairs = zip(blocks, targets, strict=True)
    return weights, [combine(weights, block).view(target.shape) for block, target in pairs]


def _problem(outputs: list[Tensor], targets: list[Tensor]) -> Problem:
    start = (Init(outputs) >> Diagonalize(outputs))()
    return Problem.of(outputs, targets, [start[output] for output in outputs])


def _gramian(complete: Problem) -> Tensor:
    problem = cheap_products(complete)
    kind = Kind.of(problem.graph)
    leaves = all(target.is_leaf for target in problem.inputs)
    if len(problem.cotangents[0]) == 1 or kind.custom or kind.failed or not leaves:
        return grouped_gramian(problem)
    return attempt(
        kind, lambda _: streamed_gramian(problem), True, lambda: grouped_gramian(problem)
    )


def _weighted_gradients(
    outputs: list[Tensor], targets: list[Tensor], weights: Tensor, retain_graph: bool
) -> list[Tensor]:
    pieces = torch.split(weights, [output.numel() for output in outputs])
    pairs = zip(outputs, pieces, strict=True)
    cotangents = [piece.view(1, *output.shape).to(output) for output, piece in pairs]
    rows = Problem.of(outputs, targets, cotangents).row_by_row(retain_graph)
    return [row[0] for row in rows]
