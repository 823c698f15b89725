from __future__ import annotations

import torch
from torch import Tensor

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import OneHot, Outer, Share

_NO_PADDING = 1 << 62  # torch shows -1 unsigned


@rule("EmbeddingBackward0")
def embedding(site: Site, operand: int) -> Share:
    """Rows of a table."""
    # How often an index occurs in the whole batch scales its gradient: no sample stands for itself.
    if site.saved("scale_grad_by_freq"):
        raise NoRule
    index, grads, shape = site.saved("indices"), site.grad, site.shapes[operand]
    grads = _without_padding(site, index, grads)
    inputs = OneHot(site.positions(index[..., None])[..., 0], shape[0], bool(site.saved("sparse")))
    return Outer(inputs, site.positions(grads, 1), grads_first=False, shape=shape)


def _without_padding(site: Site, index: Tensor, grads: Tensor) -> Tensor:
    padding = site.saved("padding_idx")
    if isinstance(padding, int) and 0 <= padding < _NO_PADDING:
        return grads.masked_fill((index == padding)[None, ..., None], 0)
    return grads


_MEAN, _MAX = 1, 2


@rule("EmbeddingBagBackward0")
def embedding_bag(site: Site, operand: int) -> Share:
    """Sums and means of rows of a table, bags of several of which may belong to a sample."""
    mode = site.saved("mode")
    # A maximum takes each feature from another row of the table, so one index does not tell the
    # row.
    if operand != 0 or mode == _MAX or site.saved("scale_grad_by_freq") or site.layout.dim != 0:
        raise NoRule
    index, grads, factors = site.saved("indices"), site.grad, site.saved("per_sample_weights")
    bags = _bags(site, len(index), grads.shape[1])
    if mode == _MEAN:
        sizes = site.saved("result2").clamp(min=1)  # a bag of nothing but padding has none
        factors = sizes.to(grads.dtype).reciprocal()[bags]
    grads = _without_padding(site, index, grads[:, bags])
    grads = grads if factors is None else grads * factors[:, None]
    chosen = _by_sample(site.layout.owners(site.grad.shape[1], index.device)[bags], site.samples)
    # What is missing, in samples of less entries than others, is looked up with a gradient of zero.
    inputs = OneHot(_padded(index, 0)[chosen], site.shapes[0][0], bool(site.saved("sparse")))
    grads = _padded(grads, 1)[:, chosen]
    return Outer(inputs, grads, grads_first=False, shape=site.shapes[0])


def _bags(site: Site, entries: int, bags: int) -> Tensor:
    """The bag of each entry."""
    found: Tensor = site.saved("result1")
    if len(found) >= entries:
        return found[:entries]
    # The fast way of sums on CPUs does not make a list of them.
    offsets = site.saved("offsets")
    # With include_last_offset, one more offset tells where the last bag ends: entries behind it
    # belong to none.
    if len(offsets) > bags and int(offsets[-1]) != entries:
        raise NoRule
    places = torch.arange(entries, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[:bags], places, right=True) - 1


def _by_sample(owners: Tensor, samples: int) -> Tensor:
    """The entries of each sample, shape [B, T]; their number stands for none."""
    # Stable, so that the sums over a sample are taken in the same order every time.
    order = owners.argsort(stable=True)
    order = order[owners[order] >= 0]
    counts = torch.bincount(owners[order], minlength=samples)
    longest = max(1, int(counts.max()))
    place = (
        torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owners[order]]
    )
    chosen = order.new_full((samples, longest), len(owners))
    chosen[owners[order], place] = order
    return chosen


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """With one more entry in a dimension, of zeros."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


@rule("IndexSelectBackward0")
def index_select(site: Site, operand: int) -> Share:
    """Rows of a matrix by one index, for samples whose entries are chosen by it."""
    index, grads, shape = site.saved("index"), site.grad, site.shapes[operand]
    if operand != 0 or len(shape) != 2 or int(site.saved("dim")) != 0 or site.layout.dim != 0:
        raise NoRule
    inputs = OneHot(site.positions(index[:, None])[..., 0], shape[0])
    return Outer(inputs, site.positions(grads, 1), grads_first=False, shape=shape)
