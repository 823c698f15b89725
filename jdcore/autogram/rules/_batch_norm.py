from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jdcore.autogram._call import LayerCall
from jdcore.autogram.blocks import Block, RowsBlock


class BatchNormRule:
    """
    Batch normalization by running statistics, a fixed scaling of each channel.

    Statistics of the batch would make every loss depend on every sample: with a ``batch_dim`` the
    engine refuses such layers, whichever rule serves them.
    """

    parameters = ("weight", "bias")

    def refusal(self, module: nn.Module) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        return running_blocks(call)


def running_blocks(call: LayerCall) -> Iterator[Block]:
    """
    The Jacobian of a normalization by running statistics.

    :param call: A call in eval mode.
    """
    module: Any = call.module
    mean, variance = call.value("running_mean"), call.value("running_var")
    assert mean is not None  # the engine refuses the other case
    assert variance is not None
    K, N, C = call.grads.shape[:3]
    grads = call.grads.reshape(K, N, C, -1)
    images = call.input.reshape(N, C, -1)
    scaled = (images - mean[:, None]) * (variance + module.eps).rsqrt()[:, None]
    weight, bias = call.wanted("weight"), call.wanted("bias")
    if weight is not None:
        sums = torch.einsum("knct,nct->knc", grads, scaled)
        yield RowsBlock(weight, sums.reshape(K, call.batch_size, -1, C).sum(2))
    if bias is not None:
        sums = grads.sum(3)
        yield RowsBlock(bias, sums.reshape(K, call.batch_size, -1, C).sum(2))
