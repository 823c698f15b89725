from __future__ import annotations

from jdcore.graph._site import NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Geometry, Patches, Share


@rule("ConvolutionBackward0")
def convolution(site: Site, operand: int) -> Share:
    """Convolutions of all kinds, also transposed and grouped ones."""
    if not site.samples_lead:
        raise NoRule
    if operand == 2:
        return site.of_channels(site.grad, 2)
    if operand != 1:
        raise NoRule
    saved = site.saved("weight"), _geometry(site), site.saved("input")
    return Patches(*saved, site.grad, site.samples)


def _geometry(site: Site) -> Geometry:
    dims = len(site.shapes[1]) - 2

    def by_dim(name: str) -> tuple[int, ...]:
        found = tuple(site.saved(name))
        return found * dims if len(found) == 1 else found  # one for all may be given once

    return Geometry(
        stride=by_dim("stride"),
        padding=by_dim("padding"),
        dilation=by_dim("dilation"),
        transposed=site.saved("transposed"),
        output_padding=by_dim("output_padding"),
        groups=site.saved("groups"),
    )
