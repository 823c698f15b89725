from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from jdcore.autogram._call import LayerCall
from jdcore.autogram.blocks import Block, RowsBlock


class PReLURule:
    """``max(0, x) + a min(0, x)``: sums of the negative inputs times the output gradient."""

    parameters = ("weight",)

    def refusal(self, module: nn.Module) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        weight = call.wanted("weight")
        if weight is None:
            return
        K, N = call.grads.shape[:2]
        products = call.grads * call.input.clamp(max=0.0)
        if len(weight) == 1:
            yield RowsBlock(weight, products.reshape(K, call.batch_size, -1).sum(2, keepdim=True))
        else:
            channels = products.reshape(K, N, len(weight), -1).sum(3)
            yield RowsBlock(weight, channels.reshape(K, call.batch_size, -1, len(weight)).sum(2))
