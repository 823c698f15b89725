from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jdcore.autogram._call import LayerCall
from jdcore.autogram.blocks import Block, RowsBlock
from jdcore.autogram.rules._batch_norm import running_blocks


class LayerNormRule:
    """Sums over positions of the normalized input times the output gradient."""

    parameters: tuple[str, ...] = ("weight", "bias")

    def refusal(self, module: nn.Module) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        module: Any = call.module
        features = math.prod(module.normalized_shape)
        K, B = call.grads.shape[0], call.batch_size
        grads = call.grads.reshape(K, B, -1, features)
        weight, bias = call.wanted("weight"), call.wanted("bias")
        if weight is not None:
            normalized = self._normalize(module, call.input).reshape(B, -1, features)
            yield RowsBlock(weight, torch.einsum("kbtf,btf->kbf", grads, normalized))
        if bias is not None:
            yield RowsBlock(bias, grads.sum(2))

    def _normalize(self, module: Any, inputs: Tensor) -> Tensor:
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)


class RMSNormRule(LayerNormRule):
    """As :class:`LayerNormRule`, without a mean and a bias."""

    parameters = ("weight",)

    def _normalize(self, module: Any, inputs: Tensor) -> Tensor:
        eps = torch.finfo(inputs.dtype).eps if module.eps is None else module.eps
        dims = tuple(range(-len(module.normalized_shape), 0))
        return inputs * (inputs.square().mean(dims, keepdim=True) + eps).rsqrt()


class GroupNormRule:
    """
    Both Jacobians from one kernel.

    The batch is folded into the groups: the backward of a group normalization of one image with
    B * G groups gives the parameter gradients of each sample apart.
    """

    parameters = ("weight", "bias")

    def refusal(self, module: nn.Module) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        images = call.input
        groups = self._groups(call.module, images)
        K, B = call.grads.shape[0], call.batch_size
        sums = [_sums(grads, images, groups, call.module.eps) for grads in call.grads]
        for position, name in enumerate(("weight", "bias")):
            parameter = call.wanted(name)
            if parameter is not None:
                of_images = torch.stack([s[position] for s in sums])
                yield RowsBlock(parameter, of_images.view(K, B, -1, images.shape[1]).sum(2))

    def _groups(self, module: Any, images: Tensor) -> int:
        del images
        return int(module.num_groups)


def _sums(grads: Tensor, images: Tensor, groups: int, eps: Any) -> tuple[Tensor, Tensor]:
    N, C = images.shape[:2]
    T = math.prod(images.shape[2:])
    images, grads = images.contiguous(), grads.contiguous()
    _, mean, deviation = torch.ops.aten.native_group_norm(images, None, None, N, C, T, groups, eps)
    _, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        grads.view(1, N * C, T),
        images.view(1, N * C, T),
        mean.view(1, -1),
        deviation.view(1, -1),
        images.new_empty(N * C),
        1,
        N * C,
        T,
        N * groups,
        [False, True, True],
    )
    return of_weight.view(N, C), of_bias.view(N, C)


class InstanceNormRule(GroupNormRule):
    """A group normalization with one group per channel; by running statistics in eval mode."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        if call.module.track_running_stats and not call.training:
            return running_blocks(call)
        return super().blocks(call)

    def _groups(self, module: Any, images: Tensor) -> int:
        del module
        return images.shape[1]
