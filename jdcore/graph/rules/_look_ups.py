from __future__ import annotations

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import OneHot, Outer, Share

_NO_PADDING = 1 << 62  # torch shows -1 unsigned


@rule("EmbeddingBackward0")
def embedding(site: Site, operand: int) -> Share:
    """Rows of a table."""
    if site.saved("scale_grad_by_freq"):
        raise NoRule
    index, grads, shape = site.saved("indices"), site.grad, site.shapes[operand]
    padding = site.saved("padding_idx")
    if isinstance(padding, int) and 0 <= padding < _NO_PADDING:
        grads = grads.masked_fill((index == padding)[None, ..., None], 0)
    inputs = OneHot(site.positions(index[..., None])[..., 0], shape[0], bool(site.saved("sparse")))
    return Outer(inputs, site.positions(grads, 1), grads_first=False, shape=shape)


@rule("IndexSelectBackward0")
def index_select(site: Site, operand: int) -> Share:
    """Rows of a matrix by one index, for samples whose entries are chosen by it."""
    index, grads, shape = site.saved("index"), site.grad, site.shapes[operand]
    if operand != 0 or len(shape) != 2 or int(site.saved("dim")) != 0 or site.layout.dim != 0:
        raise NoRule
    inputs = OneHot(site.positions(index[:, None])[..., 0], shape[0])
    return Outer(inputs, site.positions(grads, 1), grads_first=False, shape=shape)
