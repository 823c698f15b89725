from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._cost import conv_ghost_beats_direct
from jdcore.autogram._scratch import CAPACITY, Scratch, pieces
from jdcore.autogram.blocks._block import Block, Gradients, weighted_sum
from jdcore.autogram.blocks._geometry import Geometry, patch_gram, patches
from jdcore.autogram.blocks._ghost import contract

# Rows kept for the weighted gradient may take this many times the memory of the output gradients
# they replace.
_KEEP = 2.5

# Entries of copied patches, few enough to be still in the cache when they are multiplied.
_PATCHES = CAPACITY // 4


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

    def add_gramian(self, gramian: Accumulator) -> None:
        if self._ghost_is_cheaper():
            self._add_ghost(gramian)
        elif gramian.keep and self._worth_keeping():
            self._kept = self._all_rows(gramian.scratch)
            gramian.add_rows(self._kept.flatten(2).flatten(0, 1))
            self._images = self._grads = self._images[:0]
        else:
            for rows in self._pieces(gramian.scratch):
                gramian.add_rows(rows.flatten(2).flatten(0, 1))

    def _ghost_is_cheaper(self) -> bool:
        if not self._geometry.plain:
            return False
        K, B, r = self._sizes
        o, C, *kernel = self._weight.shape
        pixels, T = self._images[0, 0].numel(), self._grads[0, 0, 0].numel()
        return conv_ghost_beats_direct(K, B, r, C, o, kernel, pixels, T)

    def _worth_keeping(self) -> bool:
        size = self._grads.shape[0] * self._batch_size * self._weight.numel()
        return size <= _KEEP * self._grads.numel()

    def _shape(self, channels: int) -> tuple[int, ...]:
        o, _, *kernel = self._weight.shape
        return self._grads.shape[0], self._batch_size, o, *kernel, channels

    def _add_ghost(self, gramian: Accumulator) -> None:
        K, B, r = self._sizes
        kernel, output = self._weight.shape[2:], self._grads.shape[3:]
        gram = patch_gram(self._images, self._geometry, kernel, output, r)
        positions = self._grads.flatten(3).transpose(2, 3).reshape(K, B, -1, self._grads.shape[2])
        for product, first in contract(gram, positions):
            gramian.add(product, first)

    def add_weighted(self, weights: Tensor, gradients: Gradients) -> None:
        if self._kept is not None:
            total = weights.reshape(-1) @ self._kept.flatten(2).flatten(0, 1)
            gradient = total.view(self._kept.shape[2:]).movedim(-1, 1)
        else:
            K, B, r = self._sizes
            by_sample = self._grads.reshape(K, B, r, *self._grads.shape[2:])
            grads = weighted_sum(weights, by_sample).flatten(0, 1)
            weight = self._weight.detach().to(grads.dtype)
            gradient = self._geometry.weight_gradient(grads, self._images, weight)
        gradients.add(self.columns[0], gradient)

    def rows(self, start: int, stop: int) -> Tensor:
        if self._kept is None:
            self._kept = self._all_rows(Scratch())
        return self._kept.movedim(-1, 3)[:, :, start:stop].flatten(2).flatten(0, 1)

    # Rows have the input channels last, in which order patches are copied fastest.

    def _all_rows(self, scratch: Scratch) -> Tensor:
        rows = self._grads.new_empty(self._shape(self._weight.shape[1]))
        if self._geometry.plain:
            self._multiply(self._all_patches(), rows, scratch)
        else:
            self._differentiate(rows)
        return rows

    def _pieces(self, scratch: Scratch) -> Iterator[Tensor]:
        """Rows of some input channels after the other, in reused memory."""
        channels = self._weight.shape[1]
        if not self._geometry.plain:
            rows = scratch.rows(self._shape(channels), self._grads)
            self._differentiate(rows)
            yield rows
            return
        all_patches = self._all_patches()
        for start, stop in pieces(channels, CAPACITY // math.prod(self._shape(1))):
            rows = scratch.rows(self._shape(stop - start), self._grads)
            self._multiply(all_patches[..., start:stop], rows, scratch)
            yield rows

    def _all_patches(self) -> Tensor:
        found = patches(self._images, self._geometry, self._weight.shape[2:])
        return found.view(self._batch_size, -1, *found.shape[1:])

    def _multiply(self, of_samples: Tensor, rows: Tensor, scratch: Scratch) -> None:
        """
        Rows as products of output gradients and patches.

        :param of_samples: Patches [B, r, height, width, *kernel, c].
        :param rows: Where to write, shape [K, B, o, *kernel, c].
        """
        K, B, r = self._sizes
        o, features = rows.shape[2], math.prod(rows.shape[3:])
        rows = rows.flatten(3)
        grads = self._grads.reshape(K, B, r, o, -1).transpose(2, 3).reshape(K, B, o, -1)
        for start, stop in pieces(B, _PATCHES // (grads.shape[3] * features)):
            chosen = of_samples[start:stop]
            copied = scratch.take(tuple(chosen.shape), chosen, slot=1).copy_(chosen)
            for k in range(K):
                factor = copied.view(stop - start, -1, features)
                torch.bmm(grads[k, start:stop], factor, out=rows[k, start:stop])

    def _differentiate(self, rows: Tensor) -> None:
        """Rows by one ordinary weight gradient each."""
        K, B, r = self._sizes
        weight = self._weight.detach().to(self._grads.dtype)
        for k in range(K):
            for b in range(B):
                one = slice(b * r, (b + 1) * r)
                grads, images = self._grads[k, one], self._images[one]
                gradient = self._geometry.weight_gradient(grads, images, weight)
                rows[k, b].movedim(-1, 1).copy_(gradient)
