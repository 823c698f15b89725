from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Dense, Outer, Share, outer


@rule("MmBackward0", layers=True)
def matrix_product(site: Site, operand: int) -> Share:
    """``a @ b``."""
    other = site.saved("self" if operand else "mat2")
    return _factor(site, operand, operand == 0, other, site.grad)


@rule("AddmmBackward0", layers=True)
def matrix_product_and_sum(site: Site, operand: int) -> Share:
    """``beta * bias + alpha * a @ b``."""
    if operand == 0:
        return site.broadcast(times(site.grad, site.saved("beta")), 0)
    other = site.saved("mat1" if operand == 2 else "mat2")
    return _factor(site, operand, operand == 1, other, times(site.grad, site.saved("alpha")))


def _factor(site: Site, operand: int, first: bool, other: Tensor, grads: Tensor) -> Share:
    """
    The share of a factor of a matrix product.

    :param first: Whether it is the first one.
    :param other: The other one.
    """
    if not first:
        inputs, varied = site.positions(other), site.positions(grads, 1)
    else:
        # The rows of the first factor are those of the result, whose samples have to be in the
        # columns.
        if site.layout.dim != 1:
            raise NoRule
        site = site.turned(0)
        inputs, varied = site.positions(other.mT), site.positions(grads.mT, 1)
    return Outer(inputs, varied, grads_first=first, shape=site.shapes[operand])


@rule("BmmBackward0", "BaddbmmBackward0")
def batched_matrix_product(site: Site, operand: int) -> Share:
    """``a[e] @ b[e]`` for a batch of matrices that belong to no sample, such as experts."""
    grads = site.grad
    first = operand
    if site.name == "BaddbmmBackward0":
        if operand == 0:
            return site.broadcast(times(grads, site.saved("beta")), 0)
        grads, first = times(grads, site.saved("alpha")), operand - 1
        other = site.saved("batch1" if first else "batch2")
    else:
        other = site.saved("self" if first else "mat2")
    # As for single matrices: samples in the columns for the first factor, in the rows for the
    # second.
    if site.layout.dim != 2 - first:
        raise NoRule
    if first == 0:
        grads, other = grads.mT, other.mT
    inside = site.turned(0)
    inputs = [inside.positions(of_matrix) for of_matrix in other]
    varied = [inside.positions(grads[:, e], 1) for e in range(len(other))]
    shape = site.shapes[operand]
    if len(other) == 1:
        return Outer(inputs[0], varied[0], grads_first=first == 0, shape=shape)
    rows = [outer(x, g, grads_first=first == 0) for g, x in zip(varied, inputs, strict=True)]
    return Dense(torch.stack(rows, 2), shape)


@rule("MvBackward0")
def matrix_and_vector(site: Site, operand: int) -> Share:
    """``A @ v``, whose rows are scaled rows of A."""
    if operand != 1:
        raise NoRule
    inputs, grads = site.saved("self"), site.grad
    rows = site.positions(inputs * grads[..., None], 1)
    return Dense.summed(rows, site.shapes[1])


@rule("AddBackward0", "SubBackward0", "ExpandBackward0")
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
