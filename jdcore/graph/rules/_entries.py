from __future__ import annotations

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._products import times
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Share


@rule("AddBackward0", "ExpandBackward0")
def sum_of_entries(site: Site, operand: int) -> Share:
    """``a + alpha * b``."""
    alpha = site.saved("alpha") if operand else 1
    return site.broadcast(times(site.grad, alpha), operand)


@rule("SubBackward0")
def difference_of_entries(site: Site, operand: int) -> Share:
    """``a - alpha * b``."""
    return site.broadcast(times(site.grad, -site.saved("alpha") if operand else 1), operand)


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
