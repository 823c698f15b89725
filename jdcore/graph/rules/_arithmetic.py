from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Dense, Outer, Share, outer

# By operation, under which names its factors are saved. A sum with a third operand comes first.
_FACTORS = {
    "MmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
}


@rule("MmBackward0", "AddmmBackward0", layers=True)
@rule("BmmBackward0", "BaddbmmBackward0")
def matrix_product(site: Site, operand: int) -> Share:
    """``a @ b`` or ``beta * c + alpha * a @ b``, also for a batch of matrices, such as experts."""
    grads, factor = site.grad, operand
    if site.name in ("AddmmBackward0", "BaddbmmBackward0"):
        if operand == 0:
            return site.broadcast(times(grads, site.saved("beta")), 0)
        grads, factor = times(grads, site.saved("alpha")), operand - 1
    first, dim = factor == 0, site.layout.dim
    other = site.saved(_FACTORS[site.name][1 - factor])
    # Rows of the first factor are those of the result, so that samples have to be in its columns.
    if dim != grads.ndim - 3 + first:
        raise NoRule
    if first:
        grads, other = grads.mT, other.mT
    inside = site.turned(0) if dim else site
    shape = site.shapes[operand]
    if grads.ndim == 3:
        inputs, varied = inside.positions(other), inside.positions(grads, 1)
        return Outer(inputs, varied, grads_first=first, shape=shape)
    # The matrices of a batch belong to no sample.
    pairs = [(inside.positions(x), inside.positions(grads[:, e], 1)) for e, x in enumerate(other)]
    if len(pairs) == 1:
        return Outer(*pairs[0], grads_first=first, shape=shape)
    return Dense(torch.stack([outer(*pair, grads_first=first) for pair in pairs], 2), shape)


@rule("MvBackward0")
def matrix_and_vector(site: Site, operand: int) -> Share:
    """``A @ v``, whose rows are scaled rows of A."""
    if operand != 1:
        raise NoRule
    inputs, grads = site.saved("self"), site.grad
    rows = site.positions(inputs * grads[..., None], 1)
    return Dense.summed(rows, site.shapes[1])


@rule("AddBackward0", "SubBackward0", "ExpandBackward0", layers=True)
def sum_of_entries(site: Site, operand: int) -> Share:
    """``a + alpha * b`` or ``a - alpha * b``."""
    if operand == 0:
        return site.broadcast(site.grad, 0)
    alpha = site.saved("alpha")
    return site.broadcast(times(site.grad, -alpha if site.name == "SubBackward0" else alpha), 1)


@rule("MulBackward0")
def product_of_entries(site: Site, operand: int) -> Share:
    """``a * b``."""
    return site.broadcast(site.grad * site.saved("self" if operand else "other"), operand)


@rule("DivBackward0")
def quotient_of_entries(site: Site, operand: int) -> Share:
    """``a / b``."""
    quotients = site.grad / site.saved("other")
    if operand == 0:
        return site.broadcast(quotients, 0)
    return site.broadcast(-quotients * (site.saved("self") / site.saved("other")), 1)


@rule("PreluKernelBackward0")
def prelu(site: Site, operand: int) -> Share:
    """The slopes of a PReLU: sums of the negative inputs."""
    if operand != 1:
        raise NoRule
    return site.broadcast(site.grad * site.saved("self").clamp(max=0), 1)


def times(grads: Tensor, factor: Any) -> Tensor:
    """The gradients times a number, that is mostly one."""
    return grads if isinstance(factor, (int, float)) and factor == 1 else grads * factor
