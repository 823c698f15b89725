"""
What serves everything without a closed form: the recorded graph itself, row by row.

The forward pass is never repeated, so dropout, data-dependent control flow, compiled code and
modules with a state of their own are as right as they are in an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._passes import Objectives, gradients
from jdcore.autogram._survey import Site
from jdcore.autogram.blocks import RowsBlock


def rows_of_call(
    site: Site,
    parameters: Sequence[Parameter],
    output_grads: dict[int, Tensor],
    layouts: Sequence[str],
    samples: int,
) -> Iterator[RowsBlock]:
    """
    One backward pass per row, through the operations of one recorded call.

    :param parameters: Parameters that the call uses.
    :param output_grads: By output, shape [K, N, ...].
    :param layouts: Where the samples are in each of these.
    :param samples: B.
    """
    outputs = [site.record.outputs[index] for index in output_grads]
    K = next(iter(output_grads.values())).shape[0]
    rows = [p.new_zeros(K, samples, *p.shape) for p in parameters]
    for gate in site.gates:
        gate.closed = True
    try:
        for k in range(K):
            for b in range(samples):
                pairs = zip(output_grads.values(), layouts, strict=True)
                seeds = [_only(grads[k], layout, b, samples) for grads, layout in pairs]
                _fill(rows, k, b, _grad(outputs, parameters, seeds))
    finally:
        for gate in site.gates:
            gate.closed = False
    for parameter, of_parameter in zip(parameters, rows, strict=True):
        yield RowsBlock(parameter, of_parameter)


def _only(grads: Tensor, layout: str, sample: int, samples: int) -> Tensor:
    """The gradients of one sample, zeros for all others."""
    masked = torch.zeros_like(grads)
    size = grads.shape[0] // samples
    own: tuple[slice, ...] = (slice(sample * size, (sample + 1) * size),)
    if layout == "minor":
        own = (slice(sample, None, samples),)
    elif layout == "second":
        own = slice(None), slice(sample, sample + 1)
    masked[own] = grads[own]
    return masked


def _grad(
    outputs: Sequence[Tensor], parameters: Sequence[Parameter], seeds: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs, parameters, seeds, retain_graph=True, allow_unused=True
    )
    return found


def _fill(rows: list[Tensor], k: int, b: int, found: Sequence[Tensor | None]) -> None:
    for row, gradient in zip(rows, found, strict=True):
        if gradient is not None:
            row[k, b] = gradient.to_dense() if gradient.is_sparse else gradient


def rows_of_losses(objectives: Objectives, parameters: Sequence[Parameter]) -> Iterator[RowsBlock]:
    """One backward pass per row, from the losses: the definition of the Jacobian."""
    K, B = objectives.tasks, objectives.samples
    rows = [p.new_zeros(K, B, *p.shape) for p in parameters]
    for k in range(K):
        for b in range(B):
            weights = objectives.output.new_zeros(K, B)
            weights[k, b] = 1.0
            _fill(rows, k, b, gradients(objectives, parameters, weights, retain_graph=True))
    for parameter, of_parameter in zip(parameters, rows, strict=True):
        yield RowsBlock(parameter, of_parameter)
