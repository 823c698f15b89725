from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from jdcore.autogram._call import LayerCall
from jdcore.autogram._cost import conv_ghost_beats_rows
from jdcore.autogram.blocks import Block, PatchBlock, RowsBlock
from jdcore.autogram.blocks._geometry import Geometry


class ConvolutionRule:
    """Convolutions and transposed convolutions, strided, dilated, grouped, with any padding."""

    parameters = ("weight", "bias")

    def refusal(self, module: _ConvNd) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        module: Any = call.module
        grads = call.grads
        dims = len(module.kernel_size)
        images, padding = _padded(module, call.input)
        if images.ndim == dims + 1:
            # Without a batch; then batch_dim is None, and the whole image is one sample.
            images, grads = images[None], grads[:, None]
        weight, bias = call.wanted("weight"), call.wanted("bias")
        if weight is not None:
            geometry = _geometry(module, padding, call)
            yield PatchBlock(weight, geometry, images, grads, call.batch_size)
        if bias is not None:
            K, _, o, *_ = grads.shape
            of_samples = grads.flatten(3).sum(3).reshape(K, call.batch_size, -1, o)
            yield RowsBlock(bias, of_samples.sum(2))

    def beats_rows(
        self, module: _ConvNd, args: tuple[Any, ...], output_shape: torch.Size, tasks: int
    ) -> bool:
        plain = module.groups == 1 and not module.transposed and module.padding_mode == "zeros"
        if len(output_shape) != 4 or not plain or not args:
            return False
        o, C, *kernel = module.weight.shape
        pixels, positions = math.prod(args[0].shape[2:]), math.prod(output_shape[2:])
        return conv_ghost_beats_rows(tasks, output_shape[0], C, o, kernel, pixels, positions)


def _padded(module: Any, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return images, module.padding
    # "same" pads one more on the right where the kernel is even.
    both_sides = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(images, both_sides, mode=mode), (0,) * len(module.kernel_size)


def _geometry(module: Any, padding: tuple[int, ...], call: LayerCall) -> Geometry:
    extra = module.output_padding
    if module.transposed:
        extra = _output_padding(module, call.input, call.grads)
    return Geometry(
        module.stride, padding, module.dilation, module.transposed, extra, module.groups
    )


def _output_padding(module: Any, images: Tensor, grads: Tensor) -> tuple[int, ...]:
    # It may have been chosen by the argument `output_size`, so it is read off the output.
    dims = len(module.kernel_size)
    return tuple(
        grads.shape[d - dims]
        - (images.shape[d - dims] - 1) * module.stride[d]
        + 2 * module.padding[d]
        - module.dilation[d] * (module.kernel_size[d] - 1)
        - 1
        for d in range(dims)
    )
