from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._cost import conv_form
from jdcore.autogram._scratch import CAPACITY, pieces
from jdcore.autogram.blocks._block import Block, Gradients, weighted_sum
from jdcore.autogram.blocks._ghost import contract

# Rows kept for the weighted gradient may take this many times the memory of the output gradients
# they replace.
_KEEP = 2.5


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


class PatchBlock(Block):
    """
    The weight of a convolution.

    :param weight: The weight ``[o, C / groups, *kernel]``, or ``[C, o / groups, *kernel]`` if
        transposed.
    :param geometry: How it is applied.
    :param images: Input [N, C, ...], N = B * r.
    :param grads: Output gradients [K, N, o, ...].
    :param batch_size: B.
    """

    def __init__(
        self, weight: Parameter, geometry: Geometry, images: Tensor, grads: Tensor, batch_size: int
    ) -> None:
        self._weight, self._geometry = weight, geometry
        self._images, self._grads, self._batch_size = images, grads, batch_size
        self.dtype = grads.dtype
        self._kept: Tensor | None = None
        self.columns = ((weight, None),)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        B = self._batch_size
        return self._grads.shape[0], B, self._images.shape[0] // B

    def form(self) -> str:
        """Which form the cost model chooses: "ghost", "rows" or "patches"."""
        if not self._geometry.plain:
            return "rows"
        K, B, r = self._sizes
        o, C, height, width = self._weight.shape
        pixels = self._images.shape[2] * self._images.shape[3]
        T = self._grads.shape[3] * self._grads.shape[4]
        return conv_form(K, B, r, C, o, height * width, pixels, T, CAPACITY)

    def add_gramian(self, gramian: Accumulator) -> None:
        form = self.form()
        if form == "ghost":
            self._add_ghost(gramian)
        elif form == "rows":
            self._add_rows(gramian)
        else:
            self._add_patches(gramian)

    def _add_ghost(self, gramian: Accumulator) -> None:
        K, B, _ = self._sizes
        gram = patch_gram(
            self._images, self._geometry, *self._weight.shape[2:], *self._grads.shape[3:]
        )
        positions = self._grads.flatten(3).transpose(2, 3).reshape(K, B, -1, self._grads.shape[2])
        gramian.add(contract(gram, positions))

    def _add_rows(self, gramian: Accumulator) -> None:
        K, B, _ = self._sizes
        P = self._weight.numel()
        keep = gramian.keep and _KEEP * self._grads.numel() >= K * B * P
        if keep:
            rows = self._grads.new_empty(K * B, P)
        else:
            rows = gramian.scratch.take((K * B, P), self._grads)
        gramian.add_rows(self._fill(rows))
        if keep:
            self._kept = rows
            self._images = self._grads = self._images[:0]

    def _fill(self, rows: Tensor) -> Tensor:
        K, B, r = self._sizes
        weight = self._weight.detach().to(self._grads.dtype)
        for k in range(K):
            for b in range(B):
                one = slice(b * r, (b + 1) * r)
                grads, images = self._grads[k, one], self._images[one]
                gradient = self._geometry.weight_gradient(grads, images, weight)
                rows[k * B + b].view(weight.shape).copy_(gradient)
        return rows

    def _add_patches(self, gramian: Accumulator) -> None:
        K, B, r = self._sizes
        o, C, *kernel = self._weight.shape
        height, width = self._grads.shape[3:]
        T, area = height * width, kernel[0] * kernel[1]
        largest = min(CAPACITY // (K * B * o * area), CAPACITY // (B * r * area * T))
        for start, stop in pieces(C, largest):
            n = (stop - start) * area
            patches = self._patches(gramian, start, stop).view(B, r, n, T)
            rows = gramian.scratch.take((K, B, o, n), self._grads)
            for k in range(K):
                grads = self._grads[k].reshape(B, r, o, T)
                if r == 1:
                    torch.bmm(grads[:, 0], patches[:, 0].transpose(1, 2), out=rows[k])
                else:
                    rows[k] = torch.einsum("brot,brnt->bon", grads, patches)
            gramian.add_rows(rows.view(K * B, -1))

    def _patches(self, gramian: Accumulator, start: int, stop: int) -> Tensor:
        """Patches [N, c * kernel, T]. Copied from a strided view: faster than unfold."""
        geometry = self._geometry
        (top, left), (down, right) = geometry.padding, geometry.stride
        images = pad(self._images[:, start:stop], (left, left, top, top))
        N, C, _, _ = images.shape
        kernel, output = self._weight.shape[2:], self._grads.shape[3:]
        of_image, of_channel, of_row, of_column = images.stride()
        steps = of_row * geometry.dilation[0], of_column * geometry.dilation[1]
        strides = (of_image, of_channel, *steps, of_row * down, of_column * right)
        view = images.as_strided((N, C, *kernel, *output), strides, images.storage_offset())
        return gramian.scratch.take(tuple(view.shape), images, slot=1).copy_(view)

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        if self._kept is not None:
            gradients.add(self.columns[0], weights.reshape(-1) @ self._kept)
            return
        K, B, r = self._sizes
        by_sample = self._grads.reshape(K, B, r, *self._grads.shape[2:])
        grads = weighted_sum(weights, by_sample).flatten(0, 1)
        weight = self._weight.detach().to(grads.dtype)
        gradients.add(self.columns[0], self._geometry.weight_gradient(grads, self._images, weight))

    def rows(self, start: int, stop: int) -> Tensor:
        K, B, _ = self._sizes
        if self._kept is None:
            self._kept = self._fill(self._grads.new_empty(K * B, self._weight.numel()))
        rows = self._kept.view(-1, *self._weight.shape)
        return rows[:, start:stop].flatten(1)


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
