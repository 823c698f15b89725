"""The inner products of the gradients of the losses of two batches, each of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdcore.autogram._step import Step
from jdcore.autogram._together import collect
from jdcore.distributed._exchange import Collected, forms_of
from jdcore.graph import Accumulator, Dense, Jacobian, Share
from jdcore.graph._cancelling import multiplied
from jdcore.linalg._gramian import sum_cross_gramians


def crossed(one: Step, other: Step) -> Tensor:
    """
    The inner products of the rows of two Jacobians, float64 [m, l].

    The shares of both batches are brought together as those of several processes are: the Gramian
    of all their samples has the products of one with the other.

    :param one: Of a vector of m losses, with samples.
    :param other: Of a vector of l losses, with samples, of the same parameters.
    """
    with one.opened() as of_one, other.opened() as of_other:
        return _crossed((one, other), (of_one, of_other))


def _crossed(steps: Sequence[Step], jacobians: Sequence[Jacobian]) -> Tensor:
    alone = [j.objectives.samples < 2 or j.goes_one_by_one() for j in jacobians]
    # The shares of one sample alone are others than those of several.
    if any(alone):
        return _by_rows(jacobians)
    device, memory = steps[0].objectives.outputs[0].device, jacobians[0].memory
    found = [Collected(step.objectives, device, memory) for step in steps]
    for step, jacobian, collected in zip(steps, jacobians, found, strict=True):
        collect(step, jacobian, collected, retain_graph=True)
    # Batches may take different branches of a model; shares are paired by their order, which then
    # means nothing.
    if _kinds(found[0]) != _kinds(found[1]):
        return _by_rows(jacobians)
    m, rows = found[0].rows, found[0].rows + found[1].rows
    shares = [_joined(*pair) for pair in zip(found[0].shares, found[1].shares, strict=True)]

    def added_up() -> tuple[Tensor, bool]:
        total = Accumulator(rows, device, False, memory)
        with torch.no_grad():
            for share in shares:
                total.add_share(share)
            found = total.total
            return found, total.cancelled(found)

    gramian, _ = multiplied(rows, jacobians[0].graph.form.precision, added_up)
    # Of the Gramian of all samples, the products of one batch with the other.
    return gramian[:m, m:]


def _kinds(collected: Collected) -> list[object]:
    """What the shares of two batches have to have in common."""
    kinds = [(type(share), share.shape, share.setting) for share in collected.shares]
    return [*zip(kinds, collected.names, strict=True)]


def _joined(share: Share, other: Share) -> Share:
    """The share of the samples of both batches."""
    ours, theirs = share.factors_of_samples(), other.factors_of_samples()
    if ours is None or theirs is None or forms_of(ours) != forms_of(theirs):
        # Such as sentences of different lengths, which cannot lie side by side.
        rows = torch.cat([share.flat_rows(), other.flat_rows()], 1)
        return Dense(rows, rows.shape[2:])
    pairs = zip(ours, theirs, strict=True)
    return share.of([torch.cat([a, b], dimension) for (a, dimension), (b, _) in pairs])


def _by_rows(jacobians: Sequence[Jacobian]) -> Tensor:
    """By one backward pass for each loss."""
    one, other = (jacobian.plain_rows() for jacobian in jacobians)
    both = [tensor for tensor in one if tensor in other]
    if both:
        return sum_cross_gramians([one[t] for t in both], [other[t] for t in both])
    sizes = [jacobian.objectives.rows for jacobian in jacobians]
    return jacobians[0].objectives.outputs[0].new_zeros(sizes, dtype=torch.float64)
