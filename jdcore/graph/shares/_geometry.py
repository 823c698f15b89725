from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from jdcore.graph._memory import Memory
from jdcore.graph.shares._ghost import Gram, linear_gram
from jdcore.graph.shares._product import CONVOLUTIONS, exact_products, widened

__all__ = ["Geometry", "patch_gram", "patches"]


@frozen
class Geometry:
    """How a convolution walks over its (already padded, unless by zeros) input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def plain(self) -> bool:
        """Whether the closed forms apply: 2-D, not transposed, one group."""
        return len(self.stride) == 2 and not self.transposed and self.groups == 1

    def weight_gradient(
        self, grads: Tensor, images: Tensor, weight: Tensor, samples: int = 1
    ) -> Tensor:
        """
        The ordinary weight gradient, summed over images, in at least float32.

        :param samples: How many samples lie side by side in the channels, with a weight each.
        """
        grads, images = widened(grads), widened(images)
        dtype = torch.promote_types(grads.dtype, images.dtype)
        weight = weight.to(dtype)
        if samples > 1:
            # Its entries are not read, only its shape.
            weight = weight.expand(samples, *weight.shape).flatten(0, 1)
        with exact_products(grads, CONVOLUTIONS):
            gradient: Tensor = torch.ops.aten.convolution_backward(
                grads.to(dtype),
                images.to(dtype),
                weight,
                None,
                self.stride,
                self.padding,
                self.dilation,
                self.transposed,
                self.output_padding,
                self.groups * samples,
                [False, True, False],
            )[1]
        return gradient


def patches(images: Tensor, geometry: Geometry, kernel: Sequence[int], samples: int) -> Tensor:
    """
    All patches of a plain convolution, overlapping in memory.

    Channels come last, so that a copy moves whole runs of them.

    :param images: Shape [N, C, H, W].
    :param kernel: Height and width.
    :param samples: B.
    :returns: Shape [B, N / B, height, width, *kernel, C], height and width those of the output.
    """
    (top, left), (down, right) = geometry.padding, geometry.stride
    N, C, H, W = images.shape
    images = images.permute(0, 2, 3, 1)
    if top or left:
        # `pad` copies twice where the order of dimensions changes as well.
        padded = images.new_zeros(N, H + 2 * top, W + 2 * left, C)
        _, of_row, of_column, _ = strides = padded.stride()
        padded.as_strided((N, H, W, C), strides, top * of_row + left * of_column).copy_(images)
        images, H, W = padded, H + 2 * top, W + 2 * left
    else:
        images = images.contiguous()
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    output = (H - 1 - spans[0]) // down + 1, (W - 1 - spans[1]) // right + 1
    of_image, of_row, of_column, _ = images.stride()
    r, inside = N // samples, (of_row * geometry.dilation[0], of_column * geometry.dilation[1])
    strides = (of_image * r, of_image, of_row * down, of_column * right, *inside, 1)
    return images.as_strided((samples, r, *output, *kernel, C), strides)


def patch_gram(
    images: Tensor,
    geometry: Geometry,
    kernel: Sequence[int],
    output: Sequence[int],
    r: int,
    memory: Memory,
) -> Gram:
    """
    Gram matrix of all patches, from the Gram matrix of all pixels.

    The inner product of two patches is the sum of the inner products of their pixels, so the Gram
    of pixels is computed once and added up under the shifts of the kernel.

    :param images: Shape [N, C, H, W].
    :param kernel: Height and width.
    :param output: Height and width.
    :param r: Images per sample.
    :param memory: How temporaries are made.
    """
    if kernel == (1, 1) and not any(geometry.padding):
        # A linear layer of those pixels that are read.
        down, right = geometry.stride
        pixels = images[..., ::down, ::right].flatten(2).transpose(1, 2)
        return linear_gram(pixels.reshape(len(images) // r, -1, images.shape[1]))
    (top, left), (_, _, H, W) = geometry.padding, images.shape
    pixel_gram = linear_gram(images.flatten(2).transpose(1, 2).contiguous())

    def gram(start: int, stop: int) -> Tensor:
        first, last = start * r, stop * r
        total = pixel_gram(first, last).view(last - first, H, W, last, H, W)
        entries = total.numel() * (H + 2 * top) ** 2 // H**2 * (W + 2 * left) ** 2 // W**2
        # Of larger ones a copy with room for the padding would show in the memory of a step.
        if not memory.reused and entries <= 2 * memory.joined:
            total = _sum_at_once(total, geometry, kernel, output)
            return total.view(total.shape[:3].numel(), -1)
        for dim in (1, 0):  # the width first, since shifts of the height move whole rows
            total = _sum_of_shifts(total, geometry, dim, kernel[dim], output[dim])
        return total.view(total.shape[:3].numel(), -1)

    return gram


def _sum_at_once(
    pixels: Tensor, geometry: Geometry, kernel: Sequence[int], output: Sequence[int]
) -> Tensor:
    """
    Add up, in rows and columns of the Gram matrix alike, what lies under the kernel.

    By one operation, which is slow on CPUs.

    :param pixels: Shape [n, H, W, m, H, W].
    :returns: Shape [n, height, width, m, height, width].
    """
    (top, left), (down, right), (n, H, W, m, _, _) = (
        geometry.padding,
        geometry.stride,
        pixels.shape,
    )
    if top or left:
        height, width = H + 2 * top, W + 2 * left
        padded = pixels.new_zeros(n, height, width, m, height, width)
        strides = padded.stride()
        corner = top * (strides[1] + strides[4]) + left * (strides[2] + strides[5])
        padded.as_strided(pixels.shape, strides, corner).copy_(pixels)
        pixels = padded
    a, b, c, d, e, f = pixels.stride()
    inside = (b + e) * geometry.dilation[0], (c + f) * geometry.dilation[1]
    strides = (a, b * down, c * right, d, e * down, f * right, *inside)
    return pixels.as_strided((n, *output, m, *output, *kernel), strides).sum((6, 7))


def _sum_of_shifts(
    pixels: Tensor, geometry: Geometry, dim: int, kernel: int, output: int
) -> Tensor:
    """The same for the height or the width alone, by an addition for each offset."""
    places = 1 + dim, 4 + dim
    shape = list(pixels.shape)
    for place in places:
        shape[place] = output
    total = pixels.new_zeros(shape)
    ends, sources = total.movedim(places, (0, 1)), pixels.movedim(places, (0, 1))
    # One dimension after the other: height plus width as many additions, not height times width.
    for to, source in _shifts(geometry, dim, kernel, len(sources), output):
        ends[to, to].add_(sources[source, source])  # `+=` would copy the sum to where it is
    return total


def _shifts(
    geometry: Geometry, dim: int, kernel: int, length: int, output: int
) -> Sequence[tuple[slice, slice]]:
    """For each offset in the kernel: the outputs that touch the image, and the pixels touched."""
    stride, dilation = geometry.stride[dim], geometry.dilation[dim]
    shifts = []
    for k in range(kernel):
        offset = k * dilation - geometry.padding[dim]
        first = max(0, -(offset // stride))
        last = min(output, (length - 1 - offset) // stride + 1)
        if first < last:
            pixels = slice(first * stride + offset, (last - 1) * stride + offset + 1, stride)
            shifts.append((slice(first, last), pixels))
    return shifts
