from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from attrs import astuple, frozen
from torch import Tensor

from jdcore._modes import exact_products
from jdcore.graph._cost import GHOST_LIMIT, conv_ghost_beats_direct
from jdcore.graph._memory import Memory, blocks
from jdcore.graph.shares._ghost import Gram, add_contracted, linear_gram
from jdcore.graph.shares._product import combined, product, weighted_sum, widened
from jdcore.graph.shares._share import Accumulator, Share, check_unmodified

# Rows kept for the weighted gradient may take this many times the memory of the gradients they
# replace.
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
        with exact_products(grads, "conv"):
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


class Patches(Share):
    """
    The weight of a convolution.

    :param weight: The weight ``[o, C / groups, *kernel]``, or ``[C, o / groups, *kernel]`` if
        transposed.
    :param geometry: How it is applied.
    :param images: What the operation saved, shape [N, C, ...], N = B * r.
    :param grads: The gradients at its result, shape [K, N, o, ...].
    :param samples: B.
    """

    def __init__(
        self, weight: Tensor, geometry: Geometry, images: Tensor, grads: Tensor, samples: int
    ) -> None:
        self._weight, self._geometry, self.shape = weight, geometry, weight.shape
        self._images, self._grads = images, grads
        self._writes = images._version
        self._sizes = grads.shape[0], samples, grads.shape[1] // samples
        self._kept: Tensor | None = None

    def __repr__(self) -> str:
        K, B, r = self._sizes
        return f"Patches({K} x {B} rows of {list(self.shape)}, {r} images each)"

    # -- the Gramian -------------------------------------------------------------------------------

    def add_gramian(self, gramian: Accumulator) -> None:
        memory = gramian.memory
        if self._kept is not None:
            gramian.add_rows(self._kept)
        elif self._ghost_is_cheaper(memory):
            self._add_ghost(gramian)
        elif gramian.keep and self._worth_keeping():
            self._kept = self._all_rows(memory)
            gramian.add_rows(self._kept)
            # Slices of them would keep their memory.
            self._images = self._grads = self._kept.new_empty(0)
        else:
            for rows in self._written(memory, memory.entries):
                gramian.add_rows(rows)
                del rows  # before there are those of the next piece

    def _ghost_is_cheaper(self, memory: Memory) -> bool:
        if not self._geometry.plain:
            return False
        K, B, r = self._sizes
        o, C, *kernel = self.shape
        pixels, T = self._images.shape[2:].numel(), self._grads.shape[3:].numel()
        if kernel == [1, 1]:
            pixels = T  # no others are read
        # About four matrices of positions are there at once.
        limit = max(GHOST_LIMIT, memory.entries // 4)
        return conv_ghost_beats_direct(K, B, r, C, o, tuple(kernel), pixels, T, limit)

    def _worth_keeping(self) -> bool:
        K, B, _ = self._sizes
        return K * B * self.shape.numel() <= _KEEP * self._grads.numel()

    def _rows_of(self, features: Sequence[int]) -> tuple[int, ...]:
        """The shape of rows of some of the features of the patches."""
        K, B, _ = self._sizes
        return K, B, self.shape[0], *features

    def _add_ghost(self, gramian: Accumulator) -> None:
        K, B, r = self._sizes
        sizes = self.shape[2:], self._grads.shape[3:], r
        gram = patch_gram(self._images, self._geometry, *sizes, gramian.memory)
        positions = self._grads.flatten(3).transpose(2, 3).reshape(K, B, -1, self._grads.shape[2])
        add_contracted(gram, positions, gramian)

    # Rows have the input channels last, in which order patches are copied fastest.

    @property
    def _features(self) -> tuple[int, ...]:
        _, channels, *kernel = self.shape
        return *kernel, channels

    def _all_rows(self, memory: Memory) -> Tensor:
        [rows] = self._written(memory, math.prod(self._rows_of(self._features)))
        return rows

    def _written(self, memory: Memory, entries: int) -> Iterator[Tensor]:
        """
        Rows as matrices [R, o * features], those of a plain convolution in pieces.

        :param entries: How many a piece may have.
        """
        if not self._geometry.plain:
            rows = widened(self._grads[:0]).new_empty(self._rows_of(self._features))
            self._differentiate(rows)
            yield rows.flatten(2).flatten(0, 1)
            return
        whole = patches(self._images, self._geometry, self.shape[2:], self._sizes[1])
        parts = list(blocks(self._features, entries // math.prod(self._rows_of(()))))
        for part in parts:
            index: tuple[Any, ...] = (..., *part)
            chosen = whole[index] if len(parts) > 1 else whole
            yield self._multiplied(chosen, memory)

    def _multiplied(self, chosen: Tensor, memory: Memory) -> Tensor:
        """
        Rows as products of gradients and patches, of some of the features.

        :param chosen: Patches [B, r, height, width, *kernel, c].
        """
        K, B, r = self._sizes
        features, o = chosen.shape[4:], self._grads.shape[2]
        grads = self._grads.flatten(3)
        if r > 1:
            grads = grads.reshape(K, B, r, o, -1).transpose(2, 3).reshape(K, B, o, -1)
        length = features.numel()
        parts = memory.pieces(B, grads.shape[3] * length)
        if len(parts) == K == 1:
            # A product that need not be written to a given place takes halves as they are.
            return product(grads[0], chosen.reshape(B, -1, length)).flatten(1)
        flat = widened(grads[:0]).new_empty(self._rows_of(features)).flatten(3)
        for start, stop in parts:
            factor = chosen[start:stop].reshape(stop - start, -1, length)
            for k in range(K):
                product(grads[k, start:stop], factor, flat[k, start:stop])
            del factor  # before there are those of the next piece
        return flat.flatten(2).flatten(0, 1)

    def _differentiate(self, rows: Tensor) -> None:
        """Rows by ordinary weight gradients: those of a task by one, with groups for samples."""
        _, B, r = self._sizes

        def folded(tensor: Tensor) -> Tensor:
            found = tensor.reshape(B, r, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)
            # A size of one may have any stride, and torch refuses groups of what looks as if it had
            # its channels last.
            return found.flatten().view(found.shape) if found.is_contiguous() else found

        images = folded(self._images)
        for k, grads in enumerate(self._grads):
            found = self._geometry.weight_gradient(folded(grads), images, self._weight, samples=B)
            rows[k].movedim(-1, 2).copy_(found.view(B, *self.shape))

    # -- samples of several processes --------------------------------------------------------------

    def factors_of_samples(self) -> list[tuple[Tensor, int]]:
        _, B, r = self._sizes
        images = self._images.reshape(B, r, *self._images.shape[1:])
        grads = self._grads.reshape(-1, B, r, *self._grads.shape[2:])
        return [(images, 0), (grads, 1)]

    def of(self, factors: Sequence[Tensor]) -> Patches:
        images, grads = factors
        flat = images.flatten(0, 1), grads.flatten(1, 2)
        return Patches(self._weight, self._geometry, *flat, samples=len(images))

    @property
    def setting(self) -> tuple[Hashable, ...]:
        return astuple(self._geometry)

    # -- rows and their sums -----------------------------------------------------------------------

    def weighted(self, weights: Tensor) -> Tensor:
        if self._kept is not None:
            total = combined(weights.reshape(-1), self._kept)
            return total.view(self.shape[0], *self._features).movedim(-1, 1).reshape(self.shape)
        check_unmodified(self._images, self._writes)
        K, B, r = self._sizes
        by_sample = self._grads.reshape(K, B, r, *self._grads.shape[2:])
        grads = weighted_sum(weights, by_sample).flatten(0, 1)
        return self._geometry.weight_gradient(grads, self._images, self._weight)

    def rows(self) -> Tensor:
        if self._kept is None:
            self._kept = self._all_rows(Memory.of(self._grads.device, None))
        rows = self._kept.view(self._rows_of(self._features))
        return rows.movedim(-1, 3).reshape(*self._sizes[:2], *self.shape)


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
        # Slow on CPUs. Of larger ones a copy with room for the padding shows in the memory of a
        # step.
        if not memory.cached and entries <= 2 * memory.joined:
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
