from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from attrs import astuple
from torch import Tensor

from jdcore.graph._cost import GHOST_LIMIT, conv_ghost_beats_direct
from jdcore.graph._memory import Memory, blocks
from jdcore.graph.shares._geometry import Geometry, patch_gram, patches
from jdcore.graph.shares._ghost import add_contracted
from jdcore.graph.shares._product import combined, product, weighted_sum, widened
from jdcore.graph.shares._share import Accumulator, Share

# Rows kept for the weighted gradient may take this many times the memory of the gradients they
# replace.
_KEEP = 2.5


# Entries of the gradients of a sample from which on, on CPUs, each has a call of its own.
_ONE_IMAGE = 1 << 16


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
        self._sizes = grads.shape[0], samples, grads.shape[1] // samples
        self._kept: Tensor | None = None

    def __repr__(self) -> str:
        K, B, r = self._sizes
        return f"Patches({K} x {B} rows of {list(self.shape)}, {r} images each)"

    # -- the Gramian -------------------------------------------------------------------------------

    def add_gramian(self, gramian: Accumulator) -> None:
        memory = gramian.memory
        if self._kept is not None:
            gramian.add_rows(self._kept.flatten(2).flatten(0, 1))
        elif self._ghost_is_cheaper(memory):
            self._add_ghost(gramian)
        elif gramian.keep and self._worth_keeping():
            self._kept = self._all_rows(memory)
            gramian.add_rows(self._kept.flatten(2).flatten(0, 1))
            # Slices of them would keep their memory.
            self._images, self._grads = self._images.new_empty(0), self._grads.new_empty(0)
        else:
            for rows in self._pieces(memory):
                gramian.add_rows(rows.flatten(2).flatten(0, 1))

    def _ghost_is_cheaper(self, memory: Memory) -> bool:
        if not self._geometry.plain:
            return False
        K, B, r = self._sizes
        o, C, *kernel = self.shape
        pixels, T = self._images[0, 0].numel(), self._grads[0, 0, 0].numel()
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
        gram = patch_gram(self._images, self._geometry, self.shape[2:], self._grads.shape[3:], r)
        positions = self._grads.flatten(3).transpose(2, 3).reshape(K, B, -1, self._grads.shape[2])
        add_contracted(gram, positions, gramian)

    # Rows have the input channels last, in which order patches are copied fastest.

    @property
    def _features(self) -> tuple[int, ...]:
        _, channels, *kernel = self.shape
        return *kernel, channels

    def _all_rows(self, memory: Memory) -> Tensor:
        rows = widened(self._grads[:0]).new_empty(self._rows_of(self._features))
        if self._geometry.plain:
            self._multiply(self._all_patches(), rows, memory)
        else:
            self._differentiate(rows, memory)
        return rows

    def _pieces(self, memory: Memory) -> Iterator[Tensor]:
        """Rows of some features after the other, in reused memory."""
        features, like = self._features, widened(self._grads[:0])
        if not self._geometry.plain:
            rows = memory.rows(self._rows_of(features), like)
            self._differentiate(rows, memory)
            yield rows
            return
        all_patches = self._all_patches()
        for block in blocks(features, memory.entries // math.prod(self._rows_of(()))):
            index: tuple[Any, ...] = (..., *block)
            chosen = all_patches[index]
            rows = memory.rows(self._rows_of(chosen.shape[4:]), like)
            self._multiply(chosen, rows, memory)
            yield rows

    def _all_patches(self) -> Tensor:
        found = patches(self._images, self._geometry, self.shape[2:])
        return found.view(self._sizes[1], -1, *found.shape[1:])

    def _multiply(self, of_samples: Tensor, rows: Tensor, memory: Memory) -> None:
        """
        Rows as products of gradients and patches.

        :param of_samples: Patches [B, r, height, width, *kernel, c].
        :param rows: Where to write, shape ``[K, B, o, *kernel, c]``.
        """
        K, B, r = self._sizes
        o, features = rows.shape[2], math.prod(rows.shape[3:])
        rows = rows.flatten(3)
        grads = self._grads.reshape(K, B, r, o, -1).transpose(2, 3).reshape(K, B, o, -1)
        # Copied patches are multiplied while they are in the cache.
        scale = 4 if memory.reused else 1
        for start, stop in memory.pieces(B, scale * grads.shape[3] * features):
            chosen = of_samples[start:stop]
            copied = memory.take(tuple(chosen.shape), chosen, slot=1).copy_(chosen)
            factor = copied.view(stop - start, -1, features)
            for k in range(K):
                product(grads[k, start:stop], factor, rows[k, start:stop])

    def _differentiate(self, rows: Tensor, memory: Memory) -> None:
        """Rows by ordinary weight gradients."""
        K, B, r = self._sizes
        for k in range(K):
            if memory.reused and self._grads[0, 0].numel() * B > _ONE_IMAGE:
                for b in range(B):
                    one = slice(b * r, (b + 1) * r)
                    gradient = self._weight_gradient(self._grads[k, one], self._images[one])
                    rows[k, b].movedim(-1, 1).copy_(gradient)
            else:
                rows[k].movedim(-1, 2).copy_(self._grouped(self._grads[k]))

    def _grouped(self, grads: Tensor) -> Tensor:
        """The rows of one task by one weight gradient, of a convolution with groups for samples."""
        _, B, r = self._sizes

        def folded(tensor: Tensor) -> Tensor:
            return tensor.reshape(B, r, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)

        return self._geometry.weight_gradient(
            folded(grads), folded(self._images), self._weight, samples=B
        ).view(B, *self.shape)

    def _weight_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        return self._geometry.weight_gradient(grads, images, self._weight)

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
            kept = self._kept.flatten(2).flatten(0, 1)
            total = combined(weights.reshape(-1), kept)
            return total.view(self._kept.shape[2:]).movedim(-1, 1).reshape(self.shape)
        K, B, r = self._sizes
        by_sample = self._grads.reshape(K, B, r, *self._grads.shape[2:])
        return self._weight_gradient(weighted_sum(weights, by_sample).flatten(0, 1), self._images)

    def rows(self) -> Tensor:
        if self._kept is None:
            self._kept = self._all_rows(Memory.of(self._grads.device, None))
        return self._kept.movedim(-1, 3).reshape(*self._sizes[:2], *self.shape)
