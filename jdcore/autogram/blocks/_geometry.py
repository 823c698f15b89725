from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad

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

    def weight_gradient(self, grads: Tensor, images: Tensor, weight: Tensor) -> Tensor:
        """The ordinary weight gradient, summed over images."""
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grads,
            images,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [False, True, False],
        )[1]
        return gradient


def patches(images: Tensor, geometry: Geometry, kernel: Sequence[int]) -> Tensor:
    """
    All patches of a plain convolution, overlapping in memory.

    Channels come last, so that a copy moves whole runs of them.

    :param images: Shape [N, C, H, W].
    :param kernel: Height and width.
    :returns: Shape [N, height, width, *kernel, C], height and width those of the output.
    """
    (top, left), (down, right) = geometry.padding, geometry.stride
    images = pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
    N, H, W, C = images.shape
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    output = (H - 1 - spans[0]) // down + 1, (W - 1 - spans[1]) // right + 1
    of_image, of_row, of_column, _ = images.stride()
    inside = of_row * geometry.dilation[0], of_column * geometry.dilation[1]
    strides = (of_image, of_row * down, of_column * right, *inside, 1)
    return images.as_strided((N, *output, *kernel, C), strides)


def patch_gram(
    images: Tensor, geometry: Geometry, kh: int, kw: int, height: int, width: int
) -> Tensor:
    """
    Gram matrix of all patches, from the Gram matrix of all pixels.

    The inner product of two patches is the sum of the inner products of their pixels, so the Gram
    of pixels is computed once and added up under kh * kw shifts.

    :param images: Shape [N, C, H, W].
    :param height: Rows of the output.
    :param width: Columns of the output.
    :returns: Shape [N * height * width, N * height * width].
    """
    N, C, H, W = images.shape
    flat = images.permute(0, 2, 3, 1).reshape(N * H * W, C)
    pixels = (flat @ flat.T).view(N, H, W, N, H, W)
    total = images.new_zeros(N, height, width, N, height, width)
    rows, columns = _shifts(geometry, 0, kh, H, height), _shifts(geometry, 1, kw, W, width)
    for to_row, from_row in rows:
        for to_col, from_col in columns:
            source = pixels[:, from_row, from_col, :, from_row, from_col]
            total[:, to_row, to_col, :, to_row, to_col] += source
    return total.view(N * height * width, -1)


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
