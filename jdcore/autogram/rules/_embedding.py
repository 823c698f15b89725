from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jdcore.autogram._call import LayerCall
from jdcore.autogram.blocks import Block, ScatterBlock


class EmbeddingRule:
    """Rows of the table, scattered by index; sparse gradients stay sparse."""

    parameters = ("weight",)

    def refusal(self, module: nn.Embedding) -> str | None:
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq couples the samples of a batch"
        if module.max_norm is not None:
            return "max_norm modifies the table during the forward pass"
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        weight = call.wanted("weight")
        module: Any = call.module
        index = call.input.reshape(call.batch_size, -1)
        grads = call.positions(call.grads, 1)
        if module.padding_idx is not None:
            grads = grads * torch.ne(index, module.padding_idx)[..., None]
        if weight is not None:
            yield ScatterBlock(weight, index, grads, bool(module.sparse))

    def beats_rows(
        self, module: nn.Embedding, args: tuple[Any, ...], output_shape: torch.Size, tasks: int
    ) -> bool:
        del args, tasks
        # Rows of the whole table are dense, the gradient of few tokens is not.
        return module.sparse or output_shape.numel() < module.weight.numel()
